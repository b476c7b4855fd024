"""How the student, its gradients and its optimiser state lie over the processes: one file an engine.

`sgopd.trainer` knows the protocol alone. All methods are called by all processes at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sgopd.rollout import Batch


class Engine(Protocol):
    """Made of a `StudentLoss`."""

    parameters: list[nn.Parameter]  # what is trained, as the optimiser gets it

    def forward(self, *arguments: Any) -> Any:
        """`StudentLoss.forward`."""
        ...

    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """`StudentLoss.logprobs`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds this process's part of the gradient; `loss` is divided by the tokens of all processes already."""
        ...

    def reduce(self) -> None:
        """After the last micro-batch: makes of the parts the gradient of the sum over all processes."""
        ...

    def clip(self, max_norm: float) -> float:
        """Clips the gradient to a norm, and returns the norm that it had."""
        ...

    def finite(self) -> bool:
        """Whether all weights are."""
        ...

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The student with all its weights in this process; within it the processes need not keep step."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Whole on the main process, by their names in a checkpoint; empty on the others."""
        ...

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> Any:
        """Its state for a checkpoint's optimizer.pt, on the main process; what is in shards goes into `folder`."""
        ...

    def load_optimizer(self, optimizer: Optimizer, folder: Path, state: Any) -> None:
        """The other way round: `folder` and `state` as `save_optimizer` had and gave them."""
        ...
