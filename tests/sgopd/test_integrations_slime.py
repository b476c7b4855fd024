"""The slime advantage function against slime's contract, as its Megatron backend calls it (August 2026).

slime itself needs Megatron and SGLang on GPUs. The adapter imports nothing of it: slime loads the function by its path.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgopd.integrations.slime import gated, sg_opd


def arguments(**changes: Any) -> SimpleNamespace:
    defaults = {"use_opd": True, "opd_kl_coef": 0.0, "normalize_advantages": False, "use_rollout_logprobs": False}
    return SimpleNamespace(**{**defaults, **changes})


def rollouts(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    draw = lambda: [-3 * torch.rand(n, generator=g) for n in (5, 0, 3, 4)]  # noqa: E731  one sample has no token here
    data = {
        "log_probs": draw(),
        "teacher_log_probs": draw(),
        "rollout_log_probs": draw(),
        "rewards": [0.7, -0.7, -0.7, 0.7],  # normalised in the group: not the verdicts
        "raw_reward": [0.0] * 8,  # of all ranks
        "local_raw_reward": [1.0, 1.0, 0.0, None],
    }
    return {**data, **changes}


def test_it_is_found_by_its_path() -> None:
    module, _, name = "sgopd.integrations.slime.sg_opd".rpartition(".")
    assert getattr(importlib.import_module(module), name) is sg_opd


@pytest.mark.parametrize("source", ["log_probs", "rollout_log_probs"])
def test_advantages_are_gated_per_sample(source: str) -> None:
    data = rollouts()
    assert sg_opd(arguments(use_rollout_logprobs=source == "rollout_log_probs"), data) is None  # type: ignore[func-returns-value]
    agreed = tested = 0
    for i, verdict in enumerate((1, 1, -1, 0)):
        d = data["teacher_log_probs"][i] - data[source][i]
        agree = d * verdict > 0
        torch.testing.assert_close(data["advantages"][i], torch.where(agree, 1.8, 1.0) * d)
        assert torch.equal(data["returns"][i], data["advantages"][i])
        agreed, tested = agreed + int(agree.sum()), tested + len(d) * abs(verdict)
    assert 0 < agreed < tested
    assert data["gate_agree_fraction"] == [pytest.approx(agreed / tested)]
    assert data["gate_mean"] == [pytest.approx(1 + 0.8 * agreed / 12)]


def test_slimes_own_penalty_then_changes_nothing() -> None:
    """What slime does next under --use-opd, with its coefficient 0."""
    args, data = arguments(), rollouts()
    sg_opd(args, data)
    before = [row.clone() for row in data["advantages"]]
    for i, row in enumerate(data["advantages"]):
        data["advantages"][i] = row - args.opd_kl_coef * (data["log_probs"][i] - data["teacher_log_probs"][i])
    assert all(map(torch.equal, before, data["advantages"]))


def test_another_gate() -> None:
    data = rollouts()
    gated("protect", correct_at=0.0)(arguments(), data)
    assert all(float(row.min()) >= 0 for row in data["advantages"][:3] if len(row))  # all correct: none pushed down
    assert float(data["advantages"][3].min()) < 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="--opd-kl-coef 0"):
        sg_opd(arguments(opd_kl_coef=1.0), rollouts())
    with pytest.raises(ValueError, match="normalize"):
        sg_opd(arguments(normalize_advantages=True), rollouts())
    with pytest.raises(ValueError, match="no teacher_log_probs: pass --use-opd"):
        sg_opd(arguments(), rollouts(teacher_log_probs=None))
    with pytest.raises(ValueError, match="no local_raw_reward"):
        sg_opd(arguments(), rollouts(local_raw_reward=None))
    with pytest.raises(ValueError, match="do not match: 4 of log_probs, 4 of teacher_log_probs, 3"):
        sg_opd(arguments(), rollouts(local_raw_reward=[1, 0, 1]))
    with pytest.raises(ValueError, match="metadata"):
        sg_opd(arguments(), rollouts(local_raw_reward=[{"meta_info": {}}] * 4))
    with pytest.raises(ValueError, match="sg-opd"):
        gated("sgopd")
