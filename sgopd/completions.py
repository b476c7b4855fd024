"""completions/: some rollouts of a run as parquet, each token with what the loss measured at it.

One row a rollout, one file every logging_steps. docs/metrics.md defines the columns; the report's inspector shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config
from sgopd.data import Prompts
from sgopd.files import make_folder, new_file, writing
from sgopd.grading import read_answer
from sgopd.report.inspector import LISTS, QUANTITIES
from sgopd.rollout import Rollout
from sgopd_kernels import Stats

TOKEN_COLUMNS = {"gate_verdict": pyarrow.int8(), "token_id": pyarrow.list_(pyarrow.int32()), **LISTS}
CHARACTER_TOKENS = 4  # at most: UTF-8 has four bytes a character


def keep_token_stats(
    rollouts: Sequence[Rollout], source: str, stats: Stats, verdicts: Tensor, tolerance: float
) -> None:
    """Gives each rollout of `source` its part of `stats`, on the device that has them.

    Args:
        stats: the loss's on the tokens of these rollouts, in order.
        verdicts: of all B `rollouts`, as the gate saw them: they are others' where it is `shuffled`.
        tolerance: the gate's, in nats.
    """
    chosen = [index for index, rollout in enumerate(rollouts) if rollout.source == source]
    lengths = torch.tensor([len(rollouts[index].completion.ids) for index in chosen], dtype=torch.long)
    verdict = verdicts[chosen].repeat_interleave(lengths.to(verdicts.device))
    signed = stats.logratio * verdict
    agreement = (signed > tolerance).float() - (signed < -tolerance).float()
    columns = [getattr(stats, name) for name in QUANTITIES] + [agreement, verdict.float()]
    for index, part in zip(chosen, torch.stack(columns).split(lengths.tolist(), dim=1)):
        rollouts[index].token_stats = part


def write_completions(
    folder: Path,
    step: int,
    rollouts: Sequence[Rollout],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> None:
    """Writes `folder`/step-….parquet, one row a rollout; none for no rollouts.

    Raises:
        UserError: it cannot be written.
    """
    if not rollouts:
        return
    texts: dict[tuple[int, ...], str] = {}
    rows = [
        {
            "step": step,
            "prompt": tokenizer.decode(rollout.prompt_ids),
            "completion": rollout.completion.text,
            "answer": prompts.examples[rollout.example]["answer"],
            "extracted": read_answer(config.verifier, rollout.completion.text, config.thought_tags),
            "verdict": rollout.verdict,
            "reason": rollout.reason,
            "source": rollout.source,
            "tokens": len(rollout.completion.ids),
            "truncated": rollout.completion.truncated,
            **token_columns(rollout, tokenizer, config.num_tokens_to_log, texts),
        }
        for rollout in rollouts
    ]
    table = pyarrow.Table.from_pylist(rows)
    for name, kind in TOKEN_COLUMNS.items():  # also where no row has them
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    with writing(folder):
        make_folder(folder)
    with new_file(folder / f"step-{step:06d}.parquet") as path:
        pyarrow.parquet.write_table(table, path, compression="zstd")


def token_columns(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, limit: int, texts: dict[tuple[int, ...], str]
) -> dict[str, Any]:
    """The first `limit` tokens of a rollout; nulls where there is no limit, or the loss on it has no statistics."""
    if not limit or rollout.token_stats is None:
        return dict.fromkeys(TOKEN_COLUMNS)
    ids = rollout.completion.ids[:limit].tolist()
    *columns, agreement, verdict = rollout.token_stats[:, :limit].cpu()
    return {
        "gate_verdict": int(verdict[0]),
        "token_id": ids,
        "token_text": token_texts(ids, rollout.prompt_ids[-1:], tokenizer, texts),
        "agreement": agreement.to(torch.int8).numpy(),
        **{name: column.half().numpy() for name, column in zip(QUANTITIES, columns)},
    }


def token_texts(
    ids: Sequence[int],
    before: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    known: dict[tuple[int, ...], str],
) -> list[str]:
    """What each token adds to the text, special tokens included. `known` is filled for the next call.

    A token that only begins a character adds nothing: the one that ends it adds the character. Decoders treat the first
    token in a way of its own (some drop the space it begins with), so each is decoded behind `before`.
    """

    def decoded(*part: int) -> str:
        if part not in known:
            known[part] = tokenizer.decode(list(part), clean_up_tokenization_spaces=False)
        return known[part]

    found: list[str] = []
    held: tuple[int, ...] = ()
    for place, id in enumerate(ids):
        held += (id,)
        text = decoded(*before, *held).removeprefix(decoded(*before))
        whole = "\ufffd" not in text or len(held) == CHARACTER_TOKENS or place == len(ids) - 1
        found.append(text if whole else "")
        held = () if whole else held
    return found
