"""Properties over drawn shapes and options, and shapes without data."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sgopd_kernels import Gate, gated_kl_loss

WEIGHT = st.floats(-2, 3, allow_nan=False, width=16)
GATES = st.builds(
    Gate,
    agree=st.one_of(WEIGHT, st.tuples(WEIGHT, WEIGHT)),
    conflict=st.one_of(WEIGHT, st.tuples(WEIGHT, WEIGHT)),
    neutral=WEIGHT,
    tolerance=st.sampled_from([0.0, 0.1, 3.0]),
    keep=st.sampled_from(["all", "correct", "incorrect"]),
)
DIVERGENCES = st.one_of(
    st.sampled_from(["reverse-kl", "forward-kl"]), st.tuples(st.just("jsd"), st.sampled_from([0.05, 0.5, 0.95]))
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(0, 40),
    v=st.integers(1, 70),
    extra=st.integers(-5, 5),
    hs=st.integers(1, 9),
    ht=st.integers(1, 9),
    peak=st.sampled_from([0.01, 1.0, 6.0]),
    gate=GATES,
    divergence=DIVERGENCES,
    sampled=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    reliability=st.sampled_from([None, 0.0, 0.4, 1.0]),
    backend=st.sampled_from(["torch", "cpu"]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_options_agree_with_float64(
    kit: Any, n: int, v: int, extra: int, seed: int, **drawn: Any
) -> None:
    inputs = kit.make_inputs(
        n=n, v=v, hs=drawn["hs"], ht=drawn["ht"], v_teacher=max(1, v + extra), peak=drawn["peak"], seed=seed
    )
    options: dict[str, Any] = dict(
        gate=drawn["gate"], temperature=drawn["temperature"], reliability=drawn["reliability"], reduction="sum"
    )
    options |= {"estimator": "sampled"} if drawn["sampled"] else {"divergence": drawn["divergence"]}
    truth = kit.call(inputs.to(torch.float64), **options)
    got = kit.call(inputs, backend=drawn["backend"], **options)
    # Sums may cancel (a gate's weights have both signs): errors are measured against what was summed.
    scale = max(1e-6, float((truth[3].kl.abs() * truth[3].gate.abs()).sum()))
    if drawn["sampled"]:
        scale = max(1e-6, float((truth[3].gate * truth[3].logratio * truth[3].student_logprob).abs().sum()))
    assert abs(float(got[0]) - float(truth[0])) <= 2e-5 * scale
    for a, b in zip(got[1:3], truth[1:3]):
        assert float((a.double() - b).norm()) <= 2e-5 * float(b.norm()) + 1e-6 * max(1.0, scale, n)
    assert bool((got[3].kl >= -1e-6).all())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_without_data(device: str, reduction: str) -> None:
    """Under FakeTensor, on a device that need not exist: shapes, dtypes and the choice of backend."""
    with FakeTensorMode():
        # Without a CUDA build, torch aborts on a view of a fake CUDA tensor that requires a gradient.
        trains = device == "cpu"
        hidden = torch.empty(4, 2048, 64, device=device, dtype=torch.bfloat16, requires_grad=trains)
        weight = torch.empty(151_936, 64, device=device, dtype=torch.bfloat16, requires_grad=trains)
        teacher, t_weight = torch.empty(4, 2048, 96, device=device), torch.empty(152_064, 96, device=device)
        ids = torch.empty(4, 2048, device=device, dtype=torch.int64)
        verdict = torch.empty(4, 1, device=device)
        args = (hidden, weight, teacher, t_weight, ids, verdict)
        loss, stats = gated_kl_loss(*args, reduction=reduction, return_stats=True)
        assert loss.device.type == device and loss.dtype == torch.float32
        assert loss.shape == (() if reduction == "mean" else (4, 2048))
        assert stats.kl.shape == stats.agree.shape == (4, 2048)
        on_cuda = "triton" if importlib.util.find_spec("triton") else "torch"
        assert stats.backend == ("cpu" if device == "cpu" else on_cuda)
        if trains:
            loss.sum().backward()
            assert hidden.grad is not None and weight.grad is not None
            assert hidden.grad.shape == hidden.shape and weight.grad.dtype == torch.bfloat16
