"""The plain sampler: the loop of `sgopd.rollout` over a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.rollout import Completion, Sampling, generate


class PlainSampler:
    """Samples from a model whose own weights are trained, so that there is nothing to sync.

    Args:
        whole: a context in which the model is whole in this process (`Engine.whole`).
    """

    exact = True

    def __init__(
        self, whole: Callable[[], AbstractContextManager[PreTrainedModel]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.whole, self.tokenizer = whole, tokenizer

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        with self.whole() as model:
            return generate(model, self.tokenizer, prompts, sampling, seed)

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        pass
