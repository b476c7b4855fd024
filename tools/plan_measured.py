"""`sgopd plan` beside steps that were measured on this machine: memory and seconds by stage, for docs/scaling/plan.md.

    python tools/plan_measured.py                          SmolLM2-135M's shape, random weights: ten minutes
    python tools/plan_measured.py --models runs/smollm2    student/ and teacher/ of examples/smollm2_prepare.py
    python tools/plan_measured.py --only recomputed,adapters

Each row of settings runs in a process of its own. Memory is the peak of that process during the stage (Linux's VmHWM;
on a GPU what torch has allocated), with large blocks given back when they are freed: the C library keeps up to a
gigabyte of them otherwise. Seconds are the least of all updates but the first; on a CPU the processor's time over the
threads, which other work on the machine leaves nearly alone. Completions are as long as they may be, as the plan takes
them to be.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from sgopd import plan, startup
from sgopd.config import Config
from sgopd.trainer import Trainer

PROMPT = 64  # tokens
BASE = {"per_device_train_batch_size": 8, "max_completion_length": 64, "precision": "exact"}
ROWS: dict[str, dict[str, Any]] = {
    "8 rollouts of 64 + 64 tokens, float32": {},
    "recomputed activations": {"gradient_checkpointing": True},
    "adapters": {"use_peft": True},
    "16 rollouts of 64 + 16 tokens, 4 a forward pass": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 16,
    },
    "the same, by 320 tokens in one row": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 16,
        "max_tokens_per_device_batch": 320,
        "padding_free": True,
    },
    "autocast to bfloat16": {"bf16": True},
    "bfloat16 weights": {"dtype": "bfloat16", "teacher_dtype": "bfloat16"},
    "4 rollouts of 64 + 192 tokens": {"per_device_train_batch_size": 4, "max_completion_length": 192},
}


def make_models(folder: Path) -> None:
    """SmolLM2-135M's shape twice, with a tokenizer of digits."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True}
    shape |= {"max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    words = Tokenizer(models.WordLevel({"<eos>": 0, **{str(n): n + 1 for n in range(10)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(
            folder / name
        )


def peak() -> float:
    """Bytes at the most since `forget`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def measure(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Bytes before the first model, and of each stage bytes and seconds."""
    before, memory = peak(), {"rollout": 0.0, "update": 0.0}
    seconds: dict[str, list[float]] = {"rollout": [], "update": []}

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            forget()
            began = clock()
            result = work(*arguments, **options)
            seconds[name].append(clock() - began)
            memory[name] = max(memory[name], peak())
            return result

        return run

    trainer = Trainer(Config.load(None, settings), say=lambda line: None)
    trainer.eos_ids = ()  # nothing ends a completion
    trainer.sampler.sample = watched("rollout", trainer.sampler.sample)  # type: ignore[method-assign]
    trainer.update = watched("update", trainer.update)  # type: ignore[method-assign]
    with startup.start_verifier(trainer.config) as trainer.verifier:
        for _ in range(steps):
            rollouts, _ = trainer.make_batch()
            trainer.update(rollouts, fresh=True)
    trainer.close()
    return {
        "before": before,
        "memory": memory,
        "seconds": {name: min(found[1:]) for name, found in seconds.items()},
    }


@contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with student/ and teacher/")
    parser.add_argument("--only", help="rows with one of these words, divided by commas")
    parser.add_argument("--steps", type=int, default=3, help="updates of each row, 2 at least (default: %(default)s)")
    parser.add_argument("--settings", help=argparse.SUPPRESS)  # of one row, in a process of its own
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.settings:
        print(json.dumps(measure(json.loads(arguments.settings), arguments.steps)))
        return
    device = next((name for name in plan.DEVICES if name in gpu().lower()), "cpu")
    print(f"{gpu() or f'{os.cpu_count()} cores'}, plan for {device}\n")
    print("| settings | rollout, GB | plan | update, GB | plan | rollout, s | plan | update, s | plan |")
    print("|---|---|---|---|---|---|---|---|---|")
    with folder_of(arguments.models) as folder, tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "prompts.jsonl"
        data.write_text(json.dumps({"prompt": "1" * PROMPT, "answer": "1"}) + "\n")
        for name, changes in ROWS.items():
            if arguments.only and not any(word in name for word in arguments.only.split(",")):
                continue
            settings = {
                "model_name_or_path": str(folder / "student"),
                "teacher_model_name_or_path": str(folder / "teacher"),
                "dataset_name": str(data),
                "dataset_test_split": None,
                "output_dir": str(Path(scratch) / name.replace(" ", "-")),
                "verifier": "exact",
                **BASE,
                **changes,
            }
            command = [sys.executable, __file__, "--settings", json.dumps(settings), "--steps", str(arguments.steps)]
            # A thread that waits takes no processor's time; blocks of 2 MB and more are given back.
            environment = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": str(2 * 10**6), **os.environ}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found = json.loads(done.stdout)
            planned = {one.name: one for one in plan.plan(Config.load(None, settings), plan.DEVICES[device], 1, PROMPT)}
            cells = [
                f"{value:.2f} | {wanted:.2f}"
                for value, wanted in (
                    *((found["memory"][stage] / 1e9, planned[stage].memory / 1e9) for stage in ("rollout", "update")),
                    *((found["seconds"][stage], planned[stage].seconds or 0) for stage in ("rollout", "update")),
                )
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            print(f"  libraries before the models: {found['before'] / 1e9:.2f} GB", file=sys.stderr, flush=True)


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


if __name__ == "__main__":
    main()
