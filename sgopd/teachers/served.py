"""A teacher's last hidden states from `sgopd serve-teacher`: the exact full-vocabulary loss with a teacher elsewhere.

    GET  /v1/models    {"data": [{"id", "owned_by": "sgopd", "max_model_len"}]}
    GET  /v1/head      safetensors: weight [V, H] and perhaps bias [V]; metadata: logit_scale, softcap
    POST /v1/hidden    safetensors: ids [all tokens] int32, lengths [B], starts [B]  →  safetensors: hidden [N, H]

The N positions are those that predict each text's tokens from its start on, text after text. The head is fetched once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sgopd.config import Config, UserError
from sgopd.models import Head
from sgopd.rollout import Batch
from sgopd.servers import Server
from sgopd.teachers import Hidden, Targets
from sgopd.teachers.remote import RemoteTeacher


class HiddenTeacher(RemoteTeacher):
    """Feeds gated_kl_loss, as the teacher in the process does."""

    def __init__(self, config: Config, server: Server, model: dict[str, Any], device: torch.device) -> None:
        tensors = load(server.ask("/v1/head").content)
        softcap = model["softcap"]
        weight, bias = tensors["weight"].to(device), tensors.get("bias")
        self.head = Head(weight, None if bias is None else bias.to(device), model["logit_scale"], softcap)
        super().__init__(config, server, model, model["max_model_len"], weight.shape[0])

    def ask(self, texts: Sequence[list[int]], starts: Sequence[int]) -> list[Tensor]:
        reply = self.server.ask("/v1/hidden", content=save(request(texts, starts)))
        lengths = [len(text) - start for text, start in zip(texts, starts)]
        expected = sum(lengths), self.head.weight.shape[1]
        try:
            hidden_NH = load(reply.content)["hidden"]
            if tuple(hidden_NH.shape) != expected:
                raise ValueError(f"hidden is {tuple(hidden_NH.shape)}, expected {expected}")
            if not hidden_NH.isfinite().all():
                raise ValueError("hidden states that are not finite")
        except Exception as error:  # safetensors has its own
            raise UserError(
                f"teacher_url: {self.server.url} did not answer as `sgopd serve-teacher` does: {type(error).__name__}: "
                f"{error}. Serve the teacher with the version of the trainer"
            ) from error
        return list(hidden_NH.split(lengths))

    def targets(self, scores: Sequence[Tensor], batch: Batch) -> Hidden:
        return Hidden(torch.cat(list(scores)).to(batch.token_ids.device, self.head.weight.dtype), self.head)

    def logprobs(self, texts: Sequence[list[int]], scores: Sequence[Tensor]) -> Tensor:
        found = []
        for text, hidden_NH in zip(texts, scores):
            logits = self.head.logits(hidden_NH.to(self.head.weight)).float()
            ids = torch.tensor(text[1:], device=logits.device)
            found.append(torch.log_softmax(logits, -1).gather(-1, ids[:, None]).squeeze(-1).cpu())
        return torch.cat(found)

    def specimens(self) -> list[Targets]:
        return [Hidden.specimen(self.head)]


def request(texts: Sequence[list[int]], starts: Sequence[int]) -> dict[str, Tensor]:
    return {
        "ids": torch.tensor([id for text in texts for id in text], dtype=torch.int32),
        "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int32),
        "starts": torch.tensor(list(starts), dtype=torch.int32),
    }
