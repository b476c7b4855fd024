"""The peers' kernels as independent oracles, where they compute the same thing: the ungated divergence."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from sgopd_kernels import gated_kl_loss


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_trl_chunked_divergence(kit: Any, beta: float, softcap: float | None, backend: str) -> None:
    trl = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL is not installed (extra: trl)")
    inputs = kit.make_inputs(n=60, v=512, hs=32, ht=48, masked=0.0, seed=2)
    h, w, th, tw, ids, verdict = inputs.args()
    leaves = [(h.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    theirs, entropy = trl.ChunkedDivergenceFunction.apply(
        *leaves[0], None, th, tw, None, beta, 0.7, 1.3, softcap, 0.8, softcap
    )
    theirs.mean().backward()
    ours, stats = gated_kl_loss(
        *leaves[1],
        th,
        tw,
        ids,
        verdict,
        gate="opd",
        divergence=("jsd", beta),
        temperature=0.7,
        student_logit_scale=1.3,
        teacher_logit_scale=0.8,
        student_softcap=softcap,
        teacher_softcap=softcap,
        backend=backend,
        return_stats=True,
    )
    ours.backward()
    assert kit.relative(stats.kl, theirs.detach()) < 1e-5
    assert kit.relative(stats.student_entropy, entropy.detach()) < 1e-5
    for ours_leaf, theirs_leaf in zip(leaves[1], leaves[0]):
        assert kit.relative(ours_leaf.grad, theirs_leaf.grad) < 2e-5


_LIGER = """
    import sys, torch
    sys.path[:] = [p for p in sys.path if p]
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    from sgopd_kernels import gated_kl_loss

    g = torch.Generator().manual_seed(0)
    n, v, h = 24, 300, 32
    make = lambda *s: torch.randn(*s, generator=g)
    hs, ws, ht, wt = make(n, h), make(v, h) * 0.4, make(n, h), make(v, h) * 0.4
    ids = torch.randint(0, v, (n,), generator=g)
    for beta in (0.3, 1.0):
        a, b = hs.clone().requires_grad_(), ws.clone().requires_grad_()
        theirs = LigerFusedLinearJSDFunction.apply(a, b, ht, wt, ids, beta, -100, 1.0)
        theirs.backward()
        c, d = hs.clone().requires_grad_(), ws.clone().requires_grad_()
        ours = gated_kl_loss(c, d, ht, wt, ids, 1, gate="opd", divergence=("jsd", beta))
        ours.backward()
        for x, y in ((ours, theirs), (c.grad, a.grad), (d.grad, b.grad)):
            error = float((x - y).norm() / y.norm())
            assert error < 1e-5, (beta, error)
    print("agree")
"""


def test_liger_fused_linear_jsd_in_the_interpreter() -> None:
    pytest.importorskip("liger_kernel", reason="Liger is not installed (extra: bench)")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LIGER)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "agree" in done.stdout, done.stderr[-2000:]
