"""What the teacher says of a batch: one file a kind of teacher; `sgopd.trainer` knows the protocol alone.

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

    @classmethod
    def specimen(cls, head: Head) -> Hidden:
        """Of one position, for checks before there is a batch."""
        return cls(head.weight.new_zeros(1, head.weight.shape[1]), head)


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


@dataclass(frozen=True)
class Routed:
    """Of several teachers: each position has one of them."""

    which_N: Tensor  # the number of its teacher
    targets: tuple[Hidden | TopK | Logprob, ...]  # each teacher's, of its positions in their order

    def part(self, index: Tensor) -> Routed:
        which, parts = self.which_N[index], []
        for number, one in enumerate(self.targets):
            place = (self.which_N == number).cumsum(0) - 1  # of the teacher's own positions among themselves
            parts.append(one.part(place[index[which == number]]))
        return Routed(which, tuple(parts))


Targets: TypeAlias = Hidden | TopK | Logprob | Routed


def whole(targets: Targets) -> bool:
    """Whether they are of the whole distribution."""
    return all(map(whole, targets.targets)) if isinstance(targets, Routed) else isinstance(targets, Hidden)


class Teacher(Protocol):
    """A frozen model, wherever it is."""

    vocabulary: int  # rows of its head: no token beyond them is sampled

    def sampler_of(self, examples: Sequence[int]) -> Sampler | None:
        """Of its own rollouts for the prompts of these examples, where it can write any."""
        ...

    def start(self, rollouts: Sequence[Rollout]) -> None:
        """Rollouts that `score` will be asked about: a teacher elsewhere begins while the verifier works."""
        ...

    def score(self, batch: Batch) -> Targets:
        """What it says of the batch's positions, as constants on the batch's device."""
        ...

    def specimens(self) -> list[Targets]:
        """Of one position, in each form in which `score` gives them: for checks before there is a batch."""
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
