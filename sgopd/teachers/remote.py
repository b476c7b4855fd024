"""A teacher on a server: what its two kinds have in common. `teacher_url` names the server, which says what it is.

    vLLM, or another server with its dialect of the OpenAI API     log-probabilities (`sgopd.teachers.openai`)
    sgopd serve-teacher MODEL                                      last hidden states (`sgopd.teachers.served`)

Scoring begins when the student has written and goes on while the verifier works, `teacher_connections` requests at
once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.data import Prompts
from sgopd.models import load_frozen, logprobs_of
from sgopd.rollout import Batch, Rollout
from sgopd.servers import Server
from sgopd.teachers import Targets

TOGETHER = 8  # texts a request
# Nats between two answers of one server to the same tokens: bfloat16 in batches of other sizes stays far below.
SAME = 0.3


class RemoteTeacher:
    """Asks for the scores of texts ahead of time. A subclass says how to ask, and what to make of the answers.

    Args:
        model: the server's words on the model.
        room: tokens that a text may have.
        vocabulary: ids that the server is taken to know.
    """

    def __init__(
        self, config: Config, server: Server, model: dict[str, Any], room: int | None, vocabulary: int
    ) -> None:
        self.config, self.server, self.name = config, server, model["id"]
        self.room, self.vocabulary = room, vocabulary
        self.workers = ThreadPoolExecutor(config.teacher_connections, "teacher")
        self.pending: dict[int, tuple[Rollout, Future[list[Any]], int]] = {}
        self.probe: list[list[int]] = []
        self.probed: Tensor | None = None  # what the server said of the probe at the start
        self.again: Future[list[Any]] | None = None

    # --- of a kind ---

    def ask(self, texts: Sequence[list[int]], starts: Sequence[int]) -> list[Any]:
        """Scores of each text's tokens from `starts` on."""
        raise NotImplementedError

    def targets(self, scores: Sequence[Any], batch: Batch) -> Targets:
        raise NotImplementedError

    def logprobs(self, texts: Sequence[list[int]], scores: Sequence[Any]) -> Tensor:
        """[all tokens of the texts but each first] log-probabilities, of scores from 1 on."""
        raise NotImplementedError

    def specimens(self) -> list[Targets]:
        raise NotImplementedError

    # --- of all ---

    def sampler_of(self, examples: Sequence[int]) -> None:
        return None  # it scores, and writes nothing

    def start(self, rollouts: Sequence[Rollout]) -> None:
        self.pending.clear()
        self.submit(rollouts)
        if self.probed is not None:
            self.again = self.workers.submit(self.ask, self.probe, [1] * len(self.probe))

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        for first in range(0, len(rollouts), TOGETHER):
            part = rollouts[first : first + TOGETHER]
            texts = [rollout.prompt_ids + rollout.completion.ids.tolist() for rollout in part]
            future = self.workers.submit(self.ask, texts, [len(rollout.prompt_ids) for rollout in part])
            self.pending.update({id(rollout): (rollout, future, place) for place, rollout in enumerate(part)})

    def score(self, batch: Batch) -> Targets:
        self.submit([rollout for rollout in batch.rollouts if id(rollout) not in self.pending])
        if self.again is not None:
            scores, self.again = self.again.result(), None
            self.compare(self.logprobs(self.probe, scores), "in the middle of the run")
        scores = []
        for rollout in batch.rollouts:
            _, future, place = self.pending[id(rollout)]
            scores.append(future.result()[place])
        return self.targets(scores, batch)

    def compare(self, logprob: Tensor, when: str) -> float:
        """How far answers are from those at the start.

        Raises:
            UserError: so far that it is another model.
        """
        assert self.probed is not None
        distance = float((logprob - self.probed).abs().max())
        if not distance <= SAME:
            raise UserError(
                f"teacher_url: {self.server.url} gives other log-probabilities for the same tokens {when} (by up to "
                f"{distance:.2g} nats): it has other weights now, or its answers cannot be relied on. Start it with "
                "the teacher that the run began with, and go on with --resume_from_checkpoint auto"
            )
        return distance

    def check(self, prompts: Prompts, questions: Prompts | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The self-test: room, vocabulary, tokens, the same answers twice, those of a local copy if there is one."""
        config = self.config
        longest = max(map(len, prompts.ids)) + config.max_completion_length + 1
        if self.room is not None and longest > self.room:
            raise UserError(
                f"teacher_url: prompt and completion can have {longest - 1} tokens, and {self.server.url} takes "
                f"{self.room}, one of them for its own. Start it with a longer --max-model-len, or lower "
                "max_completion_length or max_prompt_length"
            )
        largest = max(tokenizer.get_vocab().values())
        texts = [ids[:32] for ids in prompts.ids[:7]]
        self.probe = [text if len(text) > 1 else text * 2 for text in [*texts, [*texts[0][:1], largest]]]
        scores = self.ask(self.probe, [1] * len(self.probe))
        self.check_tokens(self.probe, scores, tokenizer)
        self.probed = self.logprobs(self.probe, scores)
        began = time.perf_counter()
        again = self.compare(self.logprobs(self.probe, self.ask(self.probe, [1] * len(self.probe))), "asked twice")
        said = [
            f"teacher: {self.name} at {self.server.url}, {1e3 * (time.perf_counter() - began):.0f} ms a request; asked "
            f"twice, its log-probabilities differ by {again:.1g} nats at most"
        ]
        if config.teacher_copy is None:
            return [*said, "warning: teacher_copy is not set, so nothing tells whether the served numbers are right"]
        assert isinstance(config.teacher_copy, str)
        copy, _ = load_frozen(config.teacher_copy, config, "teacher_copy", torch.device("cpu"))
        distances = (logprobs_of(copy, self.probe) - self.probed).abs()
        if not distances.median() <= 0.05:
            raise UserError(
                f"teacher_url: {self.name} at {self.server.url} gives other log-probabilities than teacher_copy "
                f"{config.teacher_copy!r}: by {distances.median():.2g} nats at the median token, "
                f"{distances.max():.2g} at the worst. It serves another model, or serves it wrongly (a template, "
                "a quantisation, a dtype): correct the server, or leave out teacher_copy if it is another model"
            )
        return [*said, f"teacher: the local copy's log-probabilities differ by {distances.max():.1g} nats at most"]

    def check_tokens(
        self, texts: Sequence[list[int]], scores: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """What a server says of its tokens is compared with the tokenizer."""

    def digest(self) -> str:
        assert self.probed is not None
        return json.dumps([round(value, 3) for value in self.probed.tolist()])

    def same(self, digest: str) -> bool:
        """The server's answers may differ by rounding from those that a checkpoint has."""
        assert self.probed is not None
        try:
            before = torch.tensor(json.loads(digest), dtype=torch.float32)
        except (ValueError, TypeError):  # the digest of a teacher in the process
            return False
        return before.shape == self.probed.shape and bool((before - self.probed).abs().max() <= SAME)

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)
        self.server.client.close()


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
