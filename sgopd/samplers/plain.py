"""The plain sampler: the loop of `sgopd.rollout` over a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.data import Prompts
from sgopd.rollout import Completion, Sampling, generate
from sgopd.samplers import Logprobs


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

    def check(self, prompts: Prompts, questions: Prompts | None) -> list[str]:
        return []  # sgopd.model_checks looks at models in this process

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]], logprobs: Logprobs) -> dict[str, float]:
        return {}

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        with self.whole() as model:
            return generate(model, self.tokenizer, prompts, sampling, seed)

    def close(self) -> None:
        pass
