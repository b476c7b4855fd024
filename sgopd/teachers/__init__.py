"""What the teacher says of a batch: one file a teacher; `sgopd.trainer` knows the protocol alone.

targets = teacher.score(batch)     # of the batch's N positions, in one of the forms below
loss = StudentLoss(…)(batch, …, targets, …)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sgopd.data import Prompts
from sgopd.models import Head
from sgopd.rollout import Batch, Rollout
from sgopd.samplers import Sampler


@dataclass(frozen=True)
class Hidden:
    """Last hidden states and the head that belongs to them: the whole distribution."""

    hidden_NH: Tensor
    head: Head

    def part(self, index: Tensor) -> Hidden:
        return Hidden(self.hidden_NH[index], self.head)


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens and the sampled one, with their log-probabilities."""

    ids_NK: Tensor
    logprob_NK: Tensor

    def part(self, index: Tensor) -> TopK:
        return TopK(self.ids_NK[index], self.logprob_NK[index])


@dataclass(frozen=True)
class Logprob:
    """The sampled token's log-probability alone."""

    logprob_N: Tensor

    def part(self, index: Tensor) -> Logprob:
        return Logprob(self.logprob_N[index])


Targets: TypeAlias = Hidden | TopK | Logprob


class Teacher(Protocol):
    """A frozen model, wherever it is."""

    vocabulary: int  # rows of its head: no token beyond them is sampled

    @property
    def sampler(self) -> Sampler | None:
        """Of its own rollouts, where it can write any."""
        ...

    def start(self, rollouts: Sequence[Rollout]) -> None:
        """Rollouts that `score` will be asked about: a teacher elsewhere begins while the verifier works."""
        ...

    def score(self, batch: Batch) -> Targets:
        """What it says of the batch's positions, as constants on the batch's device."""
        ...

    def specimen(self) -> Targets:
        """Of one position, in the form in which `score` gives them: for checks before there is a batch."""
        ...

    def check(self, prompts: Prompts, questions: Prompts | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What a person should know of it, before the first rollout.

        Raises:
            UserError: it cannot score these texts, or not rightly.
        """
        ...

    def digest(self) -> str:
        """What tells it from another one: a resumed run must find the same …"""
        ...

    def same(self, digest: str) -> bool:
        """… as far as this tells."""
        ...

    def close(self) -> None: ...
