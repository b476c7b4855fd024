"""Data parallel: every process holds the whole student, its gradient and its optimiser state.

The model is not wrapped. Gradients, already divided by the global token count, are added up by hand once an update.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sgopd.processes import Processes, together
from sgopd.rollout import Batch
from sgopd.student_loss import StudentLoss


class DataParallel:
    """The engine of one process, and of several that hold the same."""

    def __init__(self, loss: StudentLoss, processes: Processes) -> None:
        self.loss, self.student, self.processes = loss, loss.student, processes
        self.parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]

    def forward(self, *arguments: Any) -> Any:
        return self.loss(*arguments)

    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        return self.loss.logprobs(batch, temperature)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self) -> None:
        if self.processes.count == 1:
            return
        waiting = []
        with together():
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
            for handle in waiting:
                handle.wait()

    def clip(self, max_norm: float) -> float:
        return nn.utils.clip_grad_norm_(self.parameters, max_norm).item()

    def finite(self) -> bool:
        return bool(nn.utils.get_total_norm(self.parameters, math.inf).isfinite())

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        return contextlib.nullcontext(self.student)

    def weights(self) -> dict[str, Tensor]:
        return self.student.state_dict() if self.processes.main else {}

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> Any:
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: Optimizer, folder: Path, state: Any) -> None:
        optimizer.load_state_dict(state)
