"""Prompts with reference answers: loading, tokenising, and an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sgopd.chat import Message, encode_conversation
from sgopd.config import Config, UserError
from sgopd.rows import Example, Row, is_file, load_rows, texts_of

# What may have to be said of prompts.
ENDED = "are closed by the tokenizer with an end of sequence, which is left out: the student is to go on"
BEGUN = "have a beginning of sequence in their text, so that the tokenizer's own is left out"
LISTED = "have a list as answer, all of which belongs to it"
SPECIAL = "hold special tokens as text in a message; they become the tokens themselves"
WRITTEN = "are conversations written out as text, and are read as text: give them as lists of {role, content}"
MISSING = "read like a missing value, or have an answer that does: 'None', 'null' or 'nan'"
UNKNOWN = "hold what the tokenizer does not know"
NO_VALUES = "none", "null", "nan", "<na>"
SEEN_TO = ENDED, BEGUN, LISTED


@dataclass
class Prompts:
    """Examples and their prompts as token ids, without the dropped ones."""

    examples: list[Example]
    ids: list[list[int]]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    remarks: list[str] = field(default_factory=list)  # what a person should know of them

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
        UserError: the data cannot be read, a row is of no use (it says which), or every prompt is empty or over-long.
    """
    prompts = encode(load_rows(config, split), tokenizer, config, "evaluation" if split == "eval" else "training")
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


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: Config, name: str = "training") -> Prompts:
    """Token ids of each prompt: conversations through the chat template, text as it is (or as a user message).

    Raises:
        UserError: a conversation that the template does not take; the message says in which row.
    """
    prompts = Prompts([], [])
    dropped = {"empty": 0, "over-long": 0}
    first: dict[str, str] = {}  # what is to be said of prompts -> the row that it is true of first …
    remarks = Counter[str]()  # … and how often
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = re.compile("|".join(map(re.escape, {*tokenizer.all_special_tokens, *added})) or "(?!)")
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown_id = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
    for place, columns, several in rows:
        prompt = columns["prompt"]
        if isinstance(prompt, str) and config.apply_chat_template:
            prompt = [{"role": "user", "content": prompt}]
        said: list[str] = [LISTED] if several else []
        ids: list[int] = []
        try:
            if is_empty(prompt):
                pass
            elif isinstance(prompt, str):
                ids = encode_text(prompt, tokenizer, said)
            else:
                ids = encode_conversation(prompt, tokenizer, config, said)
                texts = [text for message in prompt for text in texts_of(message["content"])]
                if any(map(special.search, [config.system_prompt or "", *texts])):
                    said.append(SPECIAL)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        except Exception as error:  # tokenizers raises no other kind
            raise UserError(f"{place}: the tokenizer cannot take the prompt: {error}") from error
        if unknown_id in ids:
            said.append(UNKNOWN)
        if any(isinstance(text, str) and text.strip().lower() in NO_VALUES for text in (prompt, columns["answer"])):
            said.append(MISSING)
        if not ids:
            dropped["empty"] += 1
        elif config.max_prompt_length is not None and len(ids) > config.max_prompt_length:
            dropped["over-long"] += 1
        else:
            prompts.examples.append(columns)
            prompts.ids.append(ids)
            remarks.update(said)
            for remark in said:
                first.setdefault(remark, place)
    prompts.dropped = {reason: count for reason, count in dropped.items() if count}
    if prompts.dropped:
        reasons = " and ".join(f"{count} {reason}" for reason, count in prompts.dropped.items())
        prompts.remarks.append(f"warning: dropped {reasons} prompts, {len(prompts)} are left")
    for remark, count in remarks.items():
        sign = "" if remark in SEEN_TO else "warning: "
        prompts.remarks.append(f"{sign}{count} of {len(prompts)} {name} prompts {remark} (first: {first[remark]})")
    return prompts


def is_empty(prompt: str | list[Message]) -> bool:
    """Whether nothing is asked."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(
        text.strip() for message in prompt if message["role"] != "system" for text in texts_of(message["content"])
    )


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, said: list[str]) -> list[int]:
    """Token ids of plain text, without an end of sequence behind it or a second beginning before it."""
    if re.match(r"""\s*\[?\s*\{\s*["'](role|content)["']\s*:""", text):
        said.append(WRITTEN)
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    while len(ids) > 1 and added[len(ids) - 1] and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    if len(ids) < len(added):
        said.append(ENDED)
    if added[:1] == [1] and ids[:2] == [tokenizer.bos_token_id] * 2:
        del ids[0]
        said.append(BEGUN)
    return ids


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
