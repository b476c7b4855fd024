"""Where rollouts come from: one file a sampler; `sgopd.trainer` and `sgopd.evaluate` know the protocol alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config
from sgopd.data import Prompts
from sgopd.processes import Processes
from sgopd.rollout import Completion, Sampling

# By the model that is trained, of all tokens of the texts but each first, at a temperature. Called by all processes.
Logprobs: TypeAlias = Callable[[Sequence[list[int]], float], Tensor]


class Sampler(Protocol):
    """Samples completions of one model."""

    exact: bool  # the same weights, prompts and seed give the same completions, to the bit

    def check(self, prompts: Prompts, questions: Prompts | None) -> list[str]:
        """What a person should know of it, before the first rollout.

        Raises:
            UserError: it cannot sample from these prompts.
        """
        ...

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]], logprobs: Logprobs) -> dict[str, float]:
        """From here on, samples from the weights of `step`. Called by all processes at once, before they sample.

        Args:
            weights: gives them whole on the main process, by their names in a checkpoint; called by all or by none.

        Returns:
            Metrics of this process.

        Raises:
            UserError: it samples from something else.
        """
        ...

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One completion for each prompt (token ids, not empty). Processes need not call it together.

        Raises:
            UserError: there is nothing to sample from.
        """
        ...

    def close(self) -> None: ...


def student_sampler(
    config: Config,
    processes: Processes,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    whole: Callable[[], AbstractContextManager[PreTrainedModel]],
    vocabulary: int,
) -> Sampler:
    """The one that `config.sampler` names, of the student.

    Args:
        model: the student, as the engine has it.
        whole: a context in which it is whole in this process (`Engine.whole`).
        vocabulary: rows of its head that may be sampled.
    """
    if config.sampler == "vllm":
        from sgopd.samplers.vllm import VllmSampler  # it needs an extra

        return VllmSampler(config, processes, model, tokenizer, vocabulary)
    from sgopd.samplers.plain import PlainSampler

    return PlainSampler(whole, tokenizer)
