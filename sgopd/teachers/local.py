"""The teacher in this process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd import checkpoint
from sgopd.data import Prompts
from sgopd.models import head_of, hidden_states
from sgopd.rollout import Batch, Rollout
from sgopd.samplers.plain import PlainSampler
from sgopd.teachers import Hidden, Targets


class Body(nn.Module):
    """A model's forward to its last hidden states, as a module of its own, so that an engine can put it into shards."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return hidden_states(self.model, *inputs)


class LocalTeacher:
    """A frozen model beside the student; the reference is one, too.

    Args:
        bf16: autocast its forward to bfloat16.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> None:
        self.model, self.body, self.bf16 = model, Body(model), bf16
        self.head = head_of(model)
        self.vocabulary = self.head.weight.shape[0]
        self.sampler = PlainSampler(lambda: contextlib.nullcontext(model), tokenizer)

    def sampler_of(self, examples: Sequence[int]) -> PlainSampler:
        return self.sampler

    def start(self, rollouts: Sequence[Rollout]) -> None:
        pass

    @torch.no_grad()
    def score(self, batch: Batch) -> Hidden:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            hidden_BTH = self.body(*batch.inputs)
        return Hidden(hidden_BTH[batch.at], self.head)

    def specimens(self) -> list[Targets]:
        return [Hidden.specimen(self.head)]

    def check(self, prompts: Prompts, questions: Prompts | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return []  # sgopd.model_checks looks at models in this process

    def digest(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:  # first asked for before the weights lie in shards
        return checkpoint.weights_digest(self.model.state_dict())

    def same(self, digest: str) -> bool:
        return digest == self.digest()

    def close(self) -> None:
        pass
