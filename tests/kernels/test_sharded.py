"""FSDP2: the loss inside the wrapper's forward, where the heads are gathered. Two real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgopd_kernels import gated_kl_loss


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, x: Tensor, *rest: Tensor, num_items: int) -> Tensor:
        hidden = self.body(x)
        loss = gated_kl_loss(hidden, self.head.weight, *rest, student_bias=self.head.bias, num_items=num_items)
        assert isinstance(loss, Tensor)
        return loss


def worker(rank: int, args: tuple[Tensor, ...], weight: Tensor) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Student()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    part = slice(20 * rank, 20 * rank + 20)
    x, t_hidden, ids, verdict = (t[part] for t in args)
    # FSDP averages over ranks: each divides by its share of the 40 tokens.
    model(x, t_hidden, weight, ids, verdict, num_items=20).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def test_fsdp2_gradients_equal_one_process(kit: Any, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    x, t_hidden = torch.randn(40, 16, generator=g), torch.randn(40, 8, generator=g)
    ids, verdict = torch.randint(0, 50, (40,), generator=g), torch.randint(-1, 2, (40,), generator=g)
    weight = torch.randn(50, 8, generator=g)
    ranks = kit.run_ranks(worker, 2, tmp_path, (x, t_hidden, ids, verdict), weight)
    torch.manual_seed(0)
    model = Student()
    model(x, t_hidden, weight, ids, verdict, num_items=40).backward()
    for gradients in ranks:
        for name, parameter in model.named_parameters():
            assert kit.relative(gradients[name], parameter.grad) < 1e-6, name
