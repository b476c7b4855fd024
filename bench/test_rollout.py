"""Rollouts: sampled tokens a second with the quickstart's student, beside transformers' `generate`.

    pytest bench/test_rollout.py

End-of-sequence tokens don't end a completion here, so that everyone samples the same number. The error is the largest
difference of a token's log-probability from that of one float64 pass over the whole text.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sgopd
from sgopd.rollout import Sampling, generate
from sgopd.tasks import load_task

STUDENT = Path(sgopd.__file__).parent / "assets" / "quickstart" / "student"
NEW = 40  # tokens, the quickstart's


def prepare(batch: int) -> Callable[[str, bool], tuple[float, dict[str, Any]]]:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(STUDENT).eval()
    model.generation_config.eos_token_id = None
    exact = copy.deepcopy(model).double()
    chats = [example["prompt"] for example in load_task("three-sums", size=batch)]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    assert len({len(prompt) for prompt in prompts}) == 1  # nothing is padded
    inputs, seed = torch.tensor(prompts), iter(range(10**6))
    sampling = Sampling(max_completion_length=NEW, eos_ids=(), vocabulary=model.config.vocab_size)

    def ours() -> tuple[Tensor, Tensor]:
        done = generate(model, tokenizer, prompts, sampling, next(seed))
        return torch.stack([one.ids for one in done]), torch.stack([one.logprobs for one in done])

    def transformers() -> tuple[Tensor, Tensor]:
        torch.manual_seed(next(seed))
        with torch.no_grad():
            done = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = done.sequences[:, inputs.shape[1] :]
        return ids, torch.stack(done.logits, 1).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def turn(name: str, look: bool) -> tuple[float, dict[str, Any]]:
        began = time.perf_counter()
        ids, logprobs = ours() if name == "sgopd" else transformers()
        seconds = time.perf_counter() - began
        if not look:
            return seconds, {}
        with torch.no_grad():
            logits = exact(torch.cat([inputs, ids], 1)).logits[:, inputs.shape[1] - 1 : -1]
        true = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        off = float((logprobs.double() - true).abs().max())
        return seconds, {"peer": name != "sgopd", "log-probability error": off, "count": ids.numel()}

    return turn


@pytest.mark.parametrize("candidate", ["sgopd", "transformers generate"])
@pytest.mark.parametrize("case", ["32 prompts", "128 prompts", pytest.param("4 prompts", marks=pytest.mark.smoke)])
def test_rollout(case: str, candidate: str, in_turn: Any) -> None:
    seen = in_turn(lambda: prepare(int(case.split()[0])))
    assert seen["log-probability error"] <= 1e-4
