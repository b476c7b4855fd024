r"""Makes the study's students and teachers, from scratch, on one core.

    python evidence/checkpoints.py --output runs/evidence/models [--tasks sums …]

For each task (evidence/constructed.py) one model is trained well and becomes three teachers: `right` as it is, `wrong`
and `noisy` fine-tuned on corpora with mistakes. There are two students. `weak` is fine-tuned likewise, on the corpus of
that name: it has the skill, and samples it badly. `early` is `right` itself as it was when it first answered 30 % of
128 held-out questions: an early checkpoint, without any planted mistake.

OUTPUT/TASK/NAME are folders for `from_pretrained`; OUTPUT/TASK/models.json says how good each is on the study's
questions (16 answers each), which questions it gets right, and the digest of its weights. Seeds are fixed: equal
versions of torch on equal CPUs give equal weights; elsewhere accuracies move by a point or two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from constructed import LETTERS, OPERATIONS, TASKS, questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from sgopd.rollout import Sampling, generate

PAD, EOS = "<pad>", "<eos>"
SYMBOLS = [PAD, EOS, *"0123456789", *LETTERS, *OPERATIONS, *"+=>:", r"\boxed{", "}"]
IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)}
TEACHERS, STUDENTS = ("right", "wrong", "noisy"), ("weak", "early")
EVALUATED, SAMPLES = 256, 16  # the study's held-out questions, and answers to each
EARLY = 0.30  # accuracy at which `early` is kept
DIGITS = "0123456789abcdefg"  # 0 to 16 right answers, a character a question
BATCH = 128
RIGHT_UPDATES = {"sums": 1300, "sorting": 450, "rewriting": 450}
FAULT_UPDATES = {"wrong": 300, "noisy": 300, "weak": 300}


def build_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token a character, and one for \boxed{. A character that it does not know is an error."""
    backend = Tokenizer(models.WordLevel(IDS))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=48,
    )


def encode(text: str) -> list[int]:
    return [IDS[symbol] for symbol in re.findall(r"\\boxed\{|.", text)]


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        pad_token_id=IDS[PAD],
        bos_token_id=None,
        eos_token_id=IDS[EOS],
    )
    return LlamaForCausalLM(config)


def learn(
    model: LlamaForCausalLM,
    task: str,
    manner: str,
    updates: int,
    *,
    seed: int,
    peak_lr: float,
    early: Callable[[], None] | None = None,
) -> None:
    """Next-token cross-entropy on completions that `manner` writes: AdamW, warm-up, cosine decay to nothing.

    `early` is called once, as soon as the model answers EARLY of 128 held-out questions.
    """
    rng, drawn = random.Random(f"{task}/{manner}/{seed}"), TASKS[task]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = min(100, updates // 4 + 1)
    model.train()
    began = time.perf_counter()
    for update in range(updates):
        decay = 0.5 + 0.5 * math.cos(math.pi * update / updates)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((update + 1) / warm, decay)
        rows = []
        for _ in range(BATCH):
            question = drawn.draw(rng, "train")
            completion = drawn.solve(rng, question.prompt, manner)
            rows.append((encode(question.prompt), [*encode(completion), IDS[EOS]]))
        ids_BT, learned_BT = collate(rows)
        hidden_BTH = model.model(ids_BT[:, :-1]).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden_BTH[learned_BT]), ids_BT[:, 1:][learned_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if early and (update + 1) % 20 == 0 and sum(accuracy(model, task, 128, 1, seed=2)) >= EARLY * 128:
            early()
            early = None
        if (update + 1) % 200 == 0:
            print(
                f"  update {update + 1}/{updates}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    model.eval()


def collate(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(prompt, completion) rows -> ids [B, T], right-padded, and [B, T - 1] where the next token is learned."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids_BT = torch.full((len(rows), length), IDS[PAD])
    learned_BT = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids_BT[row, :end] = torch.tensor(prompt + completion)
        learned_BT[row, len(prompt) - 1 : end - 1] = True
    return ids_BT, learned_BT


def accuracy(model: LlamaForCausalLM, task: str, size: int, samples: int, seed: int = 0) -> list[int]:
    """How many of `samples` answers are right, for each of `size` held-out questions (seed 0: the study's own)."""
    asked = questions(task, "test", size, seed)
    prompts = [encode(row["prompt"]) for row in asked for _ in range(samples)]
    sampling = Sampling(TASKS[task].max_completion_length, (IDS[EOS],), len(SYMBOLS), batch_size=1024)
    texts = [one.text for one in generate(model, build_tokenizer(), prompts, sampling, seed=0)]
    right = [text.endswith(f"\\boxed{{{asked[i // samples]['answer']}}}") for i, text in enumerate(texts)]
    return [sum(right[i * samples : (i + 1) * samples]) for i in range(size)]


def digest(model: PreTrainedModel) -> str:
    """The first 16 hex digits of the SHA-256 of the weights' bytes, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def facts_of(name: str, model: PreTrainedModel, correct: list[int], samples: int) -> dict[str, Any]:
    """What models.json says of a model. `correct`: of `samples` answers, for each question."""
    average, passing = sum(correct) / len(correct) / samples, sum(map(bool, correct)) / len(correct)
    print(f"{name}: avg@{samples} {average:.1%}, pass@{samples} {passing:.1%}", flush=True)
    return {
        "parameters": model.num_parameters(),
        "weights_sha256": digest(model),
        "avg": average,
        "pass": passing,
        "samples": samples,
        "correct": correct,
    }


def make(task: str, output: Path, scale: float = 1.0, asked: int = EVALUATED) -> None:
    """Trains and saves all models of a task; `scale` shortens the training, `asked` questions tell how good each is."""
    facts: dict[str, Any] = {}
    tokenizer = build_tokenizer()

    def keep(name: str, model: LlamaForCausalLM) -> None:
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        facts[name] = facts_of(f"{task}/{name}", model, accuracy(model, task, asked, SAMPLES), SAMPLES)

    model = new_model(seed=1)
    updates = {name: max(2, round(number * scale)) for name, number in (RIGHT_UPDATES | FAULT_UPDATES).items()}
    learn(model, task, "right", updates[task], seed=1, peak_lr=3e-3, early=lambda: keep("early", model))
    keep("right", model)
    skilled = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for manner in ("wrong", "noisy", "weak"):
        model.load_state_dict(skilled)
        learn(model, task, manner, updates[manner], seed=2, peak_lr=5e-4)
        keep(manner, model)
    (output / "models.json").write_text(json.dumps(facts) + "\n")


def record(folder: Path, target: Path) -> None:
    """Adds the models of `folder` that `target` lacks, a line each: right answers as a digit of base 17 a question."""
    lines = target.read_text(encoding="utf-8").splitlines() if target.is_file() else []
    for path in sorted(folder.glob("*/models.json")):
        for name, facts in json.loads(path.read_text()).items():
            correct = "".join(DIGITS[count] for count in facts["correct"])
            lines.append(json.dumps({"task": path.parent.name, "name": name, **facts, "correct": correct}))
    lines.sort(key=lambda line: json.loads(line)["task"])  # a task's models together, each set in its order
    target.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evidence/models"))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what is known of all models, a line each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would give other weights
    logging.disable_progress_bar()
    for task in arguments.tasks:
        if not (arguments.output / task / "models.json").is_file():
            make(task, arguments.output / task)
    if arguments.record:
        record(arguments.output, arguments.record)


if __name__ == "__main__":
    main()
