"""Rollouts from a vLLM server, which gets the student's weights through a folder before each batch.

    POST /pause?mode=wait, /collective_rpc {"method": "reload_weights", "kwargs": {"weights_path": …}},
         /reset_prefix_cache, /resume                                   (a server with VLLM_SERVER_DEV_MODE=1)
    POST /v1/completions {"prompt": [[ids], …], "logprobs": 0, "return_token_ids": true, …}
    → choices[i].token_ids, .logprobs.token_logprobs, .finish_reason

A server that keeps some old weights goes on as if nothing were wrong. vLLM does with tied embeddings: on CPUs the head
is a packed copy, which is made anew only where the folder has it under its own name, so it is written there. And after
every sync the log-probabilities of a few known tokens are compared with the trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.data import Prompts
from sgopd.files import make_folder, new_folder, remove_folder, remove_leftovers, writing
from sgopd.models import head_of
from sgopd.processes import Processes
from sgopd.rollout import Completion, Sampling, texts_of
from sgopd.samplers import Logprobs
from sgopd.servers import Server

TOGETHER = 8  # prompts a request


class VllmSampler:
    """Samples by a server, unseeded: a request with many seeds has ended vLLM's engine for CPUs."""

    exact = False

    def __init__(
        self,
        config: Config,
        processes: Processes,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
    ) -> None:
        assert config.sampler_url is not None
        self.config, self.processes, self.model, self.tokenizer = config, processes, model, tokenizer
        # Rows of the head that the teacher lacks.
        self.never = {str(id): -100.0 for id in range(vocabulary, head_of(model).weight.shape[0])}
        self.server = Server("sampler", config.sampler_url, config.sampler_timeout, config.sampler_connections)
        self.name = self.server.models()[0]["id"]
        self.workers = ThreadPoolExecutor(config.sampler_connections, "sampler")
        self.folder = Path(config.sampler_folder or f"{config.output_dir}/sampler").resolve()
        self.known: list[list[int]] = []  # the beginnings of some prompts
        self.step: int | None = None  # whose weights the server has

    # --- before the first rollout ---

    def check(self, prompts: Prompts, questions: Prompts | None) -> list[str]:
        self.known = [ids[:32] if len(ids) > 1 else ids * 2 for ids in prompts.ids[:8]]
        longest = max(len(ids) for data in (prompts, questions) if data is not None for ids in data.ids)
        room = self.server.models()[0].get("max_model_len")
        if room is not None and longest + self.config.max_completion_length > room:
            raise self.server.error(
                f"prompt and completion can have {longest + self.config.max_completion_length} tokens, and "
                f"{self.server.url} takes {room}. Start it with a longer --max-model-len, or lower "
                "max_completion_length or max_prompt_length"
            )
        try:
            self.server.ask("/is_paused")
        except UserError as error:
            raise UserError(f"{error}. New weights need a server of vLLM with VLLM_SERVER_DEV_MODE=1") from error
        return [
            f"rollouts: {self.name} at {self.server.url}, weights through {self.folder}. It does not sample the same "
            "again: a resumed run goes on as good as before, but not to the same bits"
        ]

    # --- weights ---

    def sync(self, step: int, weights: Callable[[], dict[str, Tensor]], logprobs: Logprobs) -> dict[str, float]:
        began = time.perf_counter()
        if step != self.step:
            whole = weights()
            self.processes.on_main(lambda: self.hand_over(step, whole))
            self.step = step
        return {**self.compare(logprobs), "time/sync": time.perf_counter() - began}

    def hand_over(self, step: int, weights: dict[str, Tensor]) -> None:
        """Writes the weights into a folder and has the server read them."""
        target = self.folder / f"step-{step:06d}"
        with writing(target):
            make_folder(self.folder)
            remove_leftovers(self.folder)
            with new_folder(target) as path:
                self.model.save_pretrained(path, state_dict=dict(weights), max_shard_size="1TB")
                self.tokenizer.save_pretrained(path)
                if tied := tied_head(self.model):
                    save_file({tied: weights[tied].contiguous()}, path / "head.safetensors", {"format": "pt"})
        self.server.ask("/pause?mode=wait", json={})
        read = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
        self.server.ask("/collective_rpc", json=read)
        self.server.ask("/reset_prefix_cache", json={})
        self.server.ask("/resume", json={})
        with writing(self.folder):
            remove_folder(target)

    def compare(self, logprobs: Logprobs) -> dict[str, float]:
        """How far the server's log-probabilities of known tokens are from the trainer's, in nats.

        Raises:
            UserError: so far that they are not the same weights, or that it gives them at another temperature.
        """
        temperature = self.config.temperature
        asked = {"max_tokens": 1, "temperature": temperature, "prompt_logprobs": 0}
        choices = self.complete(self.known, asked)
        try:
            pairs = [
                (entries[place][str(id)]["logprob"], place)
                for text, choice in zip(self.known, choices)
                for entries in [choice["prompt_logprobs"]]
                for place, id in enumerate(text)
                if place
            ]
            theirs = torch.tensor([float(value) for value, _ in pairs])
            sampled = [[*text, *choice["token_ids"]] for text, choice in zip(self.known, choices)]
            drawn = torch.tensor([choice["logprobs"]["token_logprobs"][0] for choice in choices])
        except (LookupError, TypeError, ValueError) as error:
            raise self.wrong(error) from error
        gap = (logprobs(self.known, 1.0) - theirs).abs()
        if not gap.mean() <= self.config.sampler_tolerance:
            raise self.server.error(
                f"after the sync of step {self.step}, {self.server.url} gives other log-probabilities than the "
                f"trainer: by {gap.mean():.2g} nats on average over {len(gap)} known tokens, {gap.max():.2g} at the "
                f"worst; sampler_tolerance is {self.config.sampler_tolerance:g}. It has kept old weights, or computes "
                "otherwise (quantisation, dtype). See its log; if it is as meant, raise sampler_tolerance. Then start "
                "again with --resume_from_checkpoint auto"
            )
        ends = torch.tensor([len(text) - 1 for text in sampled]).cumsum(0) - 1
        tempered = (logprobs(sampled, temperature)[ends] - drawn).abs()
        if not tempered.mean() <= self.config.sampler_tolerance + gap.mean():
            raise self.server.error(
                f"{self.server.url} gives other log-probabilities of sampled tokens than the trainer at temperature "
                f"{temperature:g}, by {tempered.mean():.2g} nats on average. Start it with --logprobs-mode "
                "processed_logprobs"
            )
        return {"sampler/gap_mean": gap.mean().item(), "sampler/gap_max": gap.max().item()}

    # --- rollouts ---

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        asked: dict[str, Any] = {"max_tokens": sampling.max_completion_length, "temperature": sampling.temperature}
        asked |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        # Exactly these end a completion, whatever the server's own config says.
        asked |= {"stop_token_ids": list(sampling.eos_ids), "ignore_eos": True}
        parts = [prompts[start : start + TOGETHER] for start in range(0, len(prompts), TOGETHER)]
        answers = self.workers.map(lambda part: self.complete(part, asked), parts)
        found = [self.read(choice, sampling) for choices in answers for choice in choices]
        texts = texts_of(self.tokenizer, prompts, [ids for ids, _, _ in found], sampling.thought_tags)
        return [Completion(*parts, text) for parts, text in zip(found, texts)]

    def complete(self, prompts: Sequence[list[int]], asked: dict[str, Any]) -> list[dict[str, Any]]:
        """The server's choices, in the order of the prompts."""
        body = {"model": self.name, "prompt": list(prompts), "logprobs": 0, "return_token_ids": True}
        # A server takes what is not named here from the model's generation_config.json.
        body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        body |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": self.never or None, **asked}
        try:
            choices = sorted(
                self.server.ask("/v1/completions", json=body).json()["choices"], key=lambda one: one["index"]
            )
            if [choice["index"] for choice in choices] != list(range(len(prompts))):
                raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
        except (LookupError, TypeError, ValueError) as error:
            raise self.wrong(error) from error
        return choices

    def read(self, choice: dict[str, Any], sampling: Sampling) -> tuple[Tensor, Tensor, bool]:
        """Token ids, log-probabilities, and whether the completion ran out of tokens; refused where it is none."""
        try:
            ids = torch.tensor(choice["token_ids"], dtype=torch.long)
            logprobs = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float32)
            ended = int(ids[-1]) in sampling.eos_ids
            if len(ids) != len(logprobs) or not (ended or len(ids) == sampling.max_completion_length):
                raise ValueError(
                    f"{len(ids)} tokens with {len(logprobs)} log-probabilities, finish_reason "
                    f"{choice.get('finish_reason')!r}: neither ended by {list(sampling.eos_ids)} nor of "
                    f"{sampling.max_completion_length} tokens"
                )
            if not 0 <= int(ids.min()) <= int(ids.max()) < sampling.vocabulary:
                raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())} of {sampling.vocabulary}")
            if not logprobs.isfinite().all():
                raise ValueError(f"log-probabilities that are not finite: {logprobs.tolist()}")
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self.wrong(error) from error
        return ids, logprobs.clamp(max=0), not ended

    def wrong(self, error: Exception) -> UserError:
        return self.server.error(
            f"{self.server.url} did not answer as vLLM does: {type(error).__name__}: {str(error)[:300]}. Expected "
            "token_ids with a log-probability each, for every prompt"
        )

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)
        self.server.client.close()


def tied_head(model: PreTrainedModel) -> str | None:
    """The name of the head's weight, where it is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
