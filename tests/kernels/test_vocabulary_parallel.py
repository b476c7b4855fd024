"""Each rank holds a slice of both heads: the result equals one rank's. Real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgopd_kernels import gated_kl_loss
from sgopd_kernels.backends.torch import VocabularySlice

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "sampled": {"estimator": "sampled", "gate": "opdvr"},
    "forward": {"divergence": "forward-kl", "temperature": 0.8},
    "jsd": {"divergence": ("jsd", 0.3), "student_softcap": 6.0, "reduction": "sum"},
    "per-token": {"reduction": "none"},
    "reference": {"reference": True},
    "bias": {"bias": True, "student_logit_scale": 0.5},
    "random": {"gate": "random"},
    "small chunks": {"workspace": 49 * 2**20},
}


def compute(inputs: Any, case: dict[str, Any], part: slice, **kwargs: Any) -> list[torch.Tensor]:
    """[loss, d_hidden, d_weight, d_bias, kl, gate] of this slice of the heads."""
    h, w, th, tw, ids, verdict = inputs.args()
    given = dict(case)
    g = torch.Generator().manual_seed(5)
    bias, reference = torch.randn(w.shape[0], generator=g), torch.randn(*tw.shape, generator=g)
    if given.pop("reference", False):
        given |= {"reference_hidden": th, "reference_weight": reference[part]}
    hidden, weight = h.clone().requires_grad_(), w[part].clone().requires_grad_()
    own_bias = bias[part].clone().requires_grad_() if given.pop("bias", False) else None
    loss, stats = gated_kl_loss(
        hidden, weight, th, tw[part], ids, verdict, student_bias=own_bias, return_stats=True, **given, **kwargs
    )
    loss.backward(torch.linspace(-1, 1, loss.numel()) if loss.ndim else None)
    d_bias = torch.zeros(0) if own_bias is None else own_bias.grad
    return [loss.detach(), hidden.grad, weight.grad, d_bias, stats.kl, stats.gate]  # type: ignore[list-item]


def worker(rank: int, world: int, inputs: Any) -> tuple[slice, dict[str, list[torch.Tensor]]]:
    v = inputs.student_weight.shape[0]
    bounds = [0, *(v * (i + 1) // world + (7 if i < world - 1 else 0) for i in range(world))]  # unequal slices
    part = slice(bounds[rank], bounds[rank + 1])
    results = {}
    for name, case in CASES.items():
        generator = torch.Generator().manual_seed(rank)  # only the first rank's may count
        results[name] = compute(inputs, case, part, process_group=dist.group.WORLD, generator=generator)
    return part, results


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one(kit: Any, tmp_path: Path, world: int) -> None:
    inputs = kit.make_inputs(n=60, v=500, hs=24, seed=6)
    ranks = kit.run_ranks(worker, world, tmp_path, world, inputs)
    for name, case in CASES.items():
        generator = torch.Generator().manual_seed(0)
        whole = compute(inputs, case, slice(None), backend="torch", generator=generator)
        for part, results in ranks:
            loss, d_hidden, d_weight, d_bias, kl, gate = results[name]
            assert torch.equal(gate, whole[5]), name
            for got, truth in ((loss, whole[0]), (d_hidden, whole[1]), (kl, whole[4])):
                assert kit.relative(got, truth) < 2e-6, name
            assert kit.relative(d_weight, whole[2][part]) < 2e-6, name
            if d_bias.numel():
                assert kit.relative(d_bias, whole[3][part]) < 2e-6, name


def test_sharded_frozen_heads_are_gathered(kit: Any, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    inputs = kit.make_inputs(n=10, v=40, hs=8)
    h, w, th, tw, ids, verdict = inputs.args()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(tw, mesh, [Shard(0)])
        assert torch.equal(gated_kl_loss(h, w, th, sharded, ids, verdict), gated_kl_loss(*inputs.args()))
        trained = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match="student_weight is a DTensor"):
            gated_kl_loss(h, trained, th, tw, ids, verdict)
    finally:
        dist.destroy_process_group()


def test_refusals(kit: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = kit.make_inputs(n=4, v=20, hs=8, v_teacher=18)
        with pytest.raises(ValueError, match="one width"):
            gated_kl_loss(*inputs.args(), process_group=dist.group.WORLD)
        with pytest.raises(NotImplementedError, match="torch backend"):
            gated_kl_loss(*inputs.args(), process_group=dist.group.WORLD, backend="cpu")
    finally:
        dist.destroy_process_group()


def test_a_large_offset_common_to_all_logits(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        z = torch.full((1, 5), 1e16, dtype=torch.float64)
        assert dist.group.WORLD is not None
        assert torch.allclose(VocabularySlice(0, 5, 5, dist.group.WORLD).log_softmax(z), torch.log_softmax(z, -1))
    finally:
        dist.destroy_process_group()
