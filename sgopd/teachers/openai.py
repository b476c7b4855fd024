"""A teacher's log-probabilities from a server with vLLM's dialect of the OpenAI API: `prompt_logprobs` of completions.

    POST /v1/completions {"prompt": [[ids], …], "max_tokens": 1, "temperature": 1, "prompt_logprobs": k}
    → choices[i].prompt_logprobs[t] = {"<id>": {"logprob": …, "rank": …, "decoded_token": …}, …}

Position 0 is null; the text's own token is always there, with k others. The temperature is ignored by the server, so
that only temperature 1 is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.rollout import Batch
from sgopd.servers import Server
from sgopd.teachers import Logprob, Targets, TopK
from sgopd.teachers.remote import RemoteTeacher, finite

Entry = dict[str, dict[str, Any]]  # of one position


class LogprobTeacher(RemoteTeacher):
    """Feeds gated_topk_kl_loss (estimator full) or gated_logprob_loss (estimator sampled)."""

    def __init__(self, config: Config, server: Server, model: dict[str, Any], vocabulary: int) -> None:
        super().__init__(config, server, model, model.get("max_model_len"), vocabulary)
        why = "a server of log-probabilities, such as vLLM, gives them"
        for setting, right, expected in (
            ("temperature", config.temperature == 1, f"1: {why} at temperature 1 alone, whatever it is asked for"),
            ("divergence", config.divergence == "reverse-kl", f"reverse-kl: {why} for that alone"),
            (
                "reference_model_name_or_path",
                config.reference_model_name_or_path is None,
                f"null: {why} without a head",
            ),
        ):
            if not right:
                raise UserError(
                    f"{setting}: got {getattr(config, setting)!r}, expected {expected}. `sgopd serve-teacher` gives "
                    "the whole distribution"
                )
        self.k = config.teacher_top_k if config.estimator == "full" else 0

    def ask(self, texts: Sequence[list[int]], starts: Sequence[int]) -> list[tuple[list[int], list[Entry]]]:
        request = {
            "model": self.name,
            "prompt": list(texts),
            "max_tokens": 1,
            "temperature": 1,
            "prompt_logprobs": self.k,
        }
        reply = self.server.ask("/v1/completions", json=request)
        try:
            choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(texts))):
                raise ValueError(f"{len(choices)} choices for {len(texts)} texts")
            found = []
            for text, start, choice in zip(texts, starts, choices):
                entries = choice["prompt_logprobs"]
                if len(entries) != len(text):
                    raise ValueError(f"{len(entries)} positions for a text of {len(text)} tokens")
                for id, entry in zip(text[start:], entries[start:]):
                    if str(id) not in entry:
                        raise ValueError(f"token {id} is not in its own position: {list(entry)[:5]}")
                    if not all(finite(one["logprob"]) for one in entry.values()):
                        raise ValueError(f"log-probabilities that are not finite: {entry}")
                found.append((text[start:], entries[start:]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"teacher_url: {self.server.url} did not answer as vLLM does: {type(error).__name__}: "
                f"{str(error)[:300]}. Expected prompt_logprobs for every token of every text"
            ) from error
        return found

    def targets(self, scores: Sequence[tuple[list[int], list[Entry]]], batch: Batch) -> Targets:
        pairs = [pair for ids, entries in scores for pair in zip(ids, entries)]
        device = batch.token_ids.device
        if self.k == 0:
            return Logprob(torch.tensor([entry[str(id)]["logprob"] for id, entry in pairs], device=device).clamp(max=0))
        rows = [columns(id, entry, self.k, self.vocabulary) for id, entry in pairs]
        K = min(map(len, rows))
        ids_NK = torch.tensor([[id for id, _ in row[:K]] for row in rows], device=device)
        return TopK(ids_NK, torch.tensor([[value for _, value in row[:K]] for row in rows], device=device).clamp(max=0))

    def logprobs(self, texts: Sequence[list[int]], scores: Sequence[tuple[list[int], list[Entry]]]) -> Tensor:
        return torch.tensor([entry[str(id)]["logprob"] for ids, entries in scores for id, entry in zip(ids, entries)])

    def specimens(self) -> list[Targets]:
        if self.k == 0:
            return [Logprob(torch.full((1,), -1.0))]
        K = min(self.k, self.vocabulary)
        return [TopK(torch.arange(K).unsqueeze(0), torch.full((1, K), -math.log(self.vocabulary)))]

    def check_tokens(
        self, texts: Sequence[list[int]], scores: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        pairs = [
            (id, entry[str(id)].get("decoded_token")) for ids, entries in scores for id, entry in zip(ids, entries)
        ]
        known = [(id, tokenizer.decode([id]), theirs) for id, theirs in pairs if isinstance(theirs, str)]
        # A part of a character, or a leading space, is written in other ways.
        others = [(id, own, theirs) for id, own, theirs in known if theirs.strip() and own.strip() != theirs.strip()]
        if len(others) > len(known) // 4:
            id, own, theirs = others[0]
            raise UserError(
                f"teacher_url: {self.server.url} reads {len(others)} of {len(known)} tokens otherwise than the "
                f"student's tokenizer: id {id} is {own!r} for the student and {theirs!r} there. Distributions cannot "
                "be compared token by token then: serve a model of the student's family, with the same tokenizer"
            )


def columns(id: int, entry: Entry, k: int, vocabulary: int) -> list[tuple[int, float]]:
    """The text's own token first, then the likeliest others: k in all, as far as they are tokens of the vocabulary."""
    others = ((int(other), one["logprob"]) for other, one in entry.items() if other != str(id))
    likeliest = sorted((one for one in others if one[0] < vocabulary), key=lambda one: -one[1])
    return [(id, entry[str(id)]["logprob"]), *likeliest[: k - 1]]
