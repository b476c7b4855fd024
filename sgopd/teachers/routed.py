"""Several teachers, one a prompt: a column of the data names it (`teacher_column`).

Each teacher scores the rollouts of its own prompts alone, and the loss is called once for each that a micro-batch has:
they may differ in width, in head, and in where they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config
from sgopd.data import Prompts, derive_seed
from sgopd.rollout import Batch, Completion, Rollout, Sampling, batch_of
from sgopd.samplers import Logprobs, Sampler
from sgopd.teachers import Routed, Targets, Teacher


class RoutedTeacher:
    """Teachers by name; two names may have the same one.

    Args:
        prompts: of training, each with the name of its teacher in `config.teacher_column` (`sgopd.rows` sees to that).
    """

    def __init__(self, teachers: dict[str, Teacher], prompts: Prompts, config: Config) -> None:
        assert config.teacher_column is not None
        self.names: list[str] = [example[config.teacher_column] for example in prompts.examples]
        self.named = teachers
        self.teachers = list({id(one): one for one in teachers.values()}.values())
        number = {name: self.teachers.index(one) for name, one in teachers.items()}
        self.numbers = [number[name] for name in self.names]  # of each example
        self.padding_free = config.padding_free
        self.vocabulary = min(one.vocabulary for one in self.teachers)

    def sampler_of(self, examples: Sequence[int]) -> Sampler | None:
        samplers = [one.sampler_of(examples) for one in self.teachers]
        return RoutedSampler(samplers, [self.numbers[example] for example in examples])

    def start(self, rollouts: Sequence[Rollout]) -> None:
        for number, teacher in enumerate(self.teachers):
            teacher.start([one for one in rollouts if self.numbers[one.example] == number])

    def score(self, batch: Batch) -> Targets:
        which_B = torch.tensor([self.numbers[one.example] for one in batch.rollouts])
        present = which_B.unique().tolist()
        if len(present) == 1:
            return self.teachers[present[0]].score(batch)
        targets = []
        for number in present:
            own = [one for one, its in zip(batch.rollouts, which_B.tolist()) if its == number]
            found = self.teachers[number].score(batch_of(own, batch.rows.device, self.padding_free))
            assert not isinstance(found, Routed)
            targets.append(found)
        which_B = torch.bucketize(which_B, torch.tensor(present))  # numbered as those in the batch
        return Routed(which_B.to(batch.rows.device)[batch.rows], tuple(targets))

    def specimens(self) -> list[Targets]:
        return [specimen for one in self.teachers for specimen in one.specimens()]

    def check(self, prompts: Prompts, questions: Prompts | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        counts = {name: self.names.count(name) for name in self.named}
        said = [f"teachers: {', '.join(f'{name} for {count} prompts' for name, count in counts.items())}"]
        said += [f"warning: no prompt names the teacher {name!r}" for name, count in counts.items() if not count]
        for number, teacher in enumerate(self.teachers):
            own = [index for index, its in enumerate(self.numbers) if its == number] or range(len(prompts))
            part = Prompts([prompts.examples[index] for index in own], [prompts.ids[index] for index in own])
            said += teacher.check(part, questions, tokenizer)
        return said

    def digest(self) -> str:
        routes = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        return json.dumps({"routes": routes, "teachers": {name: one.digest() for name, one in self.named.items()}})

    def same(self, digest: str) -> bool:
        try:
            before = json.loads(digest)
            theirs = before["teachers"]
            routes = before["routes"] == json.loads(self.digest())["routes"]
        except (ValueError, TypeError, LookupError):  # the digest of a run with one teacher
            return False
        return routes and all(name in theirs and one.same(theirs[name]) for name, one in self.named.items())

    def close(self) -> None:
        for teacher in self.teachers:
            teacher.close()


@dataclasses.dataclass
class RoutedSampler:
    """Samples each prompt from its own teacher."""

    samplers: list[Sampler | None]  # None: of a teacher that no prompt may ask to write
    numbers: list[int]  # of each prompt's
    exact = True

    def check(self, prompts: Prompts, questions: Prompts | None) -> list[str]:
        return []

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]], logprobs: Logprobs) -> dict[str, float]:
        return {}

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        found: list[Any] = [None] * len(prompts)
        for number, sampler in enumerate(self.samplers):
            own = [place for place, its in enumerate(self.numbers) if its == number]
            if own:
                assert sampler is not None
                own_seed = derive_seed(seed, number) if number else seed
                for place, one in zip(own, sampler.sample([prompts[place] for place in own], sampling, own_seed)):
                    found[place] = one
        return found

    def close(self) -> None:
        pass
