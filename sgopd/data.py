"""Prompts with reference answers: loading, tokenising, and an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config, UserError

Example = dict[str, Any]  # {"prompt": text or messages, "answer": text, … the data set's own columns}


@dataclass
class Prompts:
    """Examples and their prompts as token ids, without the dropped ones."""

    examples: list[Example]
    ids: list[list[int]]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count

    def __len__(self) -> int:
        return len(self.examples)

    def digest(self) -> str:
        """SHA-256 of the token ids, answers and all other columns, in order: the same in every process and run."""
        sha = hashlib.sha256()
        for ids, example in zip(self.ids, self.examples):
            sha.update(ascii((ids, canonical(example))).encode())
        return sha.hexdigest()


def canonical(value: Any) -> Any:
    """`value` in lists, tuples and scalars whose text does not depend on addresses, hashes or the order of keys."""
    if value is None or type(value) in (str, bytes, bool, int, float):
        return value
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return "dict", sorted(([canonical(key), canonical(item)] for key, item in value.items()), key=ascii)
    if isinstance(value, (set, frozenset)):
        return "set", sorted((canonical(item) for item in value), key=ascii)
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return "named", value.__module__, value.__qualname__
    # Dates, decimals, arrays, images, …: what pickle would write of them, which is how a verifier gets them.
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # whatever a class says that cannot be pickled, such as one with an open file
        return "object", canonical(type(value))
    if isinstance(reduced, str):
        return "named", reduced
    parts = [list(part) if number in (3, 4) and part is not None else part for number, part in enumerate(reduced)]
    return "object", canonical(parts[:5])


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, split: str) -> Prompts:
    """Prompts of the "train" or the "eval" side of `config`.

    Raises:
        UserError: the data cannot be read, a column is missing, or every prompt is empty or over-long.
    """
    examples = load_examples(config, split)
    prompts = encode(examples, tokenizer, config)
    if not prompts.examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items()) or "it has no rows"
        raise UserError(
            f"no usable prompt in the {split} data ({reasons}). Check prompt_column ({config.prompt_column!r}) "
            f"and max_prompt_length ({config.max_prompt_length})"
        )
    return prompts


def has_eval_data(config: Config) -> bool:
    """Whether there is anything to evaluate on: a file has no test split of its own."""
    if config.dataset_test_split is None:
        return False
    return config.eval_dataset_name is not None or not is_file(config.dataset_name)


def is_file(name: str) -> bool:
    return name.endswith((".jsonl", ".json", ".parquet"))


def load_examples(config: Config, split: str) -> list[Example]:
    """Rows as {"prompt", "answer", …}; see `load_prompts`."""
    evaluating = split == "eval"
    name = (config.eval_dataset_name if evaluating else None) or config.dataset_name
    size = config.eval_dataset_size if evaluating else config.dataset_size
    part = (config.dataset_test_split if evaluating else None) or config.dataset_train_split

    if name.startswith("task:"):
        from sgopd.tasks import load_task

        # The questions do not follow the run's seed: runs with different seeds are compared on the same ones.
        seed = 0 if evaluating else config.seed
        try:
            return load_task(
                name.removeprefix("task:"), **{"split": part, "size": size, "seed": seed, **config.dataset_kwargs}
            )
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"dataset_name {name!r}: {error}") from error

    rows = read_file(name) if is_file(name) else read_hub(name, part, config)
    if evaluating:
        rows = rows[:size]
    for number, row in enumerate(rows):
        for setting in ("prompt_column", "answer_column"):
            column = getattr(config, setting)
            if column not in row:
                raise UserError(
                    f"{name}: row {number} has no column {column!r}; its columns are {', '.join(row) or 'none'}. "
                    f"Name the right one with {setting}"
                )
    return [{**row, "prompt": row[config.prompt_column], "answer": str(row[config.answer_column])} for row in rows]


def read_file(name: str) -> list[Example]:
    """Rows of a JSON Lines or parquet file."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no data file {name} (looked from {Path.cwd()})")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{name} is not a readable parquet file: {error}") from error
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}, line {number}: not JSON ({error}); expected one object a line") from error
            if not isinstance(row, dict):
                raise UserError(f"{name}, line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def read_hub(name: str, split: str, config: Config) -> list[Example]:
    """Rows of a split of a `datasets` name or folder."""
    import datasets

    if name == "pandas":  # datasets' reader of .pkl files, in versions that still have it
        raise UserError(
            "dataset_name: 'pandas' reads pickles, which can run code. Save the data as parquet or JSON Lines"
        )
    try:
        data = datasets.load_dataset(name, config.dataset_config, split=split, **config.dataset_kwargs)
    except Exception as error:  # datasets raises its own, the hub's, pyarrow's and fsspec's
        raise UserError(
            f"datasets cannot load {name!r} (split {split!r}): {error}. Expected a .jsonl or .parquet file, a name "
            "or folder that datasets.load_dataset takes, or task:<name>. Where there is no evaluation split, set "
            "dataset_test_split to null"
        ) from error
    return data.to_list()


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: Config) -> Prompts:
    """Token ids of each prompt: conversations through the chat template, text as it is (or as a user message)."""
    kept, ids, dropped = [], [], {"empty": 0, "over-long": 0}
    for example in examples:
        prompt_ids = encode_one(example["prompt"], tokenizer, config)
        if not prompt_ids:
            dropped["empty"] += 1
        elif config.max_prompt_length is not None and len(prompt_ids) > config.max_prompt_length:
            dropped["over-long"] += 1
        else:
            kept.append(example)
            ids.append(prompt_ids)
    return Prompts(kept, ids, {reason: count for reason, count in dropped.items() if count})


def encode_one(prompt: Any, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[int]:
    """Token ids of one prompt; empty for an empty one."""
    if not prompt:
        return []
    if isinstance(prompt, str):
        if not config.apply_chat_template:
            return list(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    elif not (
        isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    ):
        raise UserError(f"a prompt must be text or a list of {{role, content}} messages, got {prompt!r:.200}")
    if config.system_prompt is not None:
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompts are conversations, but the student's tokenizer has no chat template. Save one with the "
            "tokenizer (chat_template.jinja), or give the prompts as plain text"
        )
    options = {"add_generation_prompt": True, "return_dict": True, **config.chat_template_kwargs}
    encoded: Any = tokenizer.apply_chat_template(prompt, tokenize=True, **options)
    return list(encoded["input_ids"])


def take(position: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of the `count` examples from `position` on, in an order shuffled anew each epoch.

    A pure function: the number of examples taken so far is all there is to resume from.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))
        indices += order[offset : offset + count - len(indices)].tolist()
    return indices


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for the random stream that `parts` name.

    Data order and sampling take a fresh generator for every use, so no generator has to be kept in a checkpoint.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
