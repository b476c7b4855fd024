r"""Named benchmarks of competition mathematics, for `sgopd evaluate … --benchmarks aime24,math500`.

A line each: where the questions are, in which columns, how many answers are sampled to one. Small sets take 32 answers
a question, as SG-OPD reports (avg@32, pass@32); the larger ones, whose mean is less noisy, take fewer.

    name          questions  of
    aime24               30  American Invitational Mathematics Examination 2024, I and II
    aime25               30  the same of 2025
    amc23                40  American Mathematics Competitions 2023
    math500             500  a part of MATH's test set, as in "Let's Verify Step by Step"
    minerva             272  OCW questions of Minerva (arXiv 2206.14858)
    olympiadbench       674  OlympiadBench (arXiv 2402.14008): English, text alone, with an answer that can be compared

Data sets' columns and counts are as their cards say (October 2026).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sgopd.config import Config, UserError

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class Benchmark(NamedTuple):
    """Questions of a `datasets` name."""

    dataset: str
    split: str
    prompt_column: str
    answer_column: str
    samples: int  # answers to each question
    config: str | None = None

    def settings(self, path: str | None = None) -> dict[str, Any]:
        """What it sets in a run's configuration. `path`, a file or folder, has the same columns in place of the hub."""
        return {
            "eval_dataset_name": path or self.dataset,
            "dataset_config": None if path else self.config,
            "dataset_test_split": self.split,
            "dataset_kwargs": {},
            "prompt_column": self.prompt_column,
            "answer_column": self.answer_column,
            "eval_dataset_size": 100_000,
            "max_prompt_length": None,
            "apply_chat_template": True,
            "num_generations_eval": self.samples,
            "eval_k": None,
            "verifier": "math",
        }


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 32),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer", 32),
    "amc23": Benchmark("math-ai/amc23", "test", "question", "answer", 32),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 4),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer", 4),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "train", "question", "final_answer", 4, config="OE_TO_maths_en_COMP"
    ),
}


def configs_of(names: str, path: Path, flags: dict[str, Any]) -> dict[str, Config]:
    """A run's or a file's configuration for each benchmark of "aime24,math500" or "aime24=local.jsonl,math500".

    Flags go over what the benchmark sets; columns are flags where all benchmarks are local. The configuration's own
    system prompt stays; without one it is INSTRUCTION.

    Raises:
        UserError: an unknown name, one that is there twice, or a flag for what the benchmark is.
    """
    benchmarks, columns = named(names), ("prompt_column", "answer_column")
    local = all(settings["eval_dataset_name"] != BENCHMARKS[name].dataset for name, settings in benchmarks.items())
    for flag in ("eval_dataset_name", "dataset_config", "dataset_test_split", *([] if local else columns)):
        if flag in flags:
            raise UserError(f"{flag}: got {flags[flag]!r}, but a benchmark has its own. Leave it or benchmarks out")
    own = Config.load(path, flags).system_prompt
    shared = {"system_prompt": own or INSTRUCTION, **flags}
    return {name: Config.load(path, {**settings, **shared}) for name, settings in benchmarks.items()}


def named(text: str) -> dict[str, dict[str, Any]]:
    """What each benchmark of a list sets."""
    found: dict[str, dict[str, Any]] = {}
    for part in text.split(","):
        name, equals, path = part.strip().partition("=")
        if equals and not path:
            raise UserError(f"benchmarks: got {part.strip()!r}, expected NAME or NAME=FILE")
        if name not in BENCHMARKS:
            raise UserError(f"benchmarks: got {name!r}, expected one or more of {', '.join(BENCHMARKS)}")
        if name in found:
            raise UserError(f"benchmarks: got {name!r} twice. Leave one out")
        found[name] = BENCHMARKS[name].settings(path or None)
    return found
