"""Where rollouts come from: one file a sampler; `sgopd.trainer` and `sgopd.evaluate` know the protocol alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from sgopd.rollout import Completion, Sampling


class Sampler(Protocol):
    """Samples completions of one model."""

    exact: bool  # the same weights, prompts and seed give the same completions, to the bit

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One completion for each prompt (token ids, not empty). Processes need not call it together.

        Raises:
            UserError: there is nothing to sample from.
        """
        ...

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        """From here on, samples from the weights of `step`. Called by all processes at once, before they sample.

        Args:
            weights: gives them whole on the main process, by their names in a checkpoint; called by all or by none.
        """
        ...
