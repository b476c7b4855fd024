"""Fully sharded (FSDP2, torch's `fully_shard`): every process holds its part of weights, gradient and optimiser state.

    torchrun --nproc_per_node 8 -m sgopd train config.yaml --fsdp true

A transformer block's weights are gathered when its turn comes, and given up after it; embedding, final norm and head
are one more such group, which is whole during the loss. Gradients are summed over the processes as they arise.
Sampling takes a whole copy of the student, which is there while it lasts (`Shards.whole`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sgopd.config import UserError
from sgopd.processes import Processes, meeting, together
from sgopd.rollout import Batch
from sgopd.student_loss import StudentLoss
from sgopd.teachers.local import LocalTeacher

SHARDS = "optimizer"  # the folder of the optimiser's state in a checkpoint


def mesh_of(processes: Processes) -> DeviceMesh:
    """All processes in a row; a group of one where this was not started by torchrun."""
    if not dist.is_initialized():
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(processes.device.type, (processes.count,))


class Shards:
    """A model whose weights lie in shards, and its copy without any, which `whole` fills.

    Args:
        root: the module whose forward is called; it has `model` in it.
        kept: parameters that stay whole in every process.
    """

    def __init__(self, root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, kept: set[nn.Parameter]) -> None:
        self.model = model
        empty: dict[int, Any] = {
            id(one): nn.Parameter(one.new_empty(0), requires_grad=one.requires_grad) for one in model.parameters()
        }
        self.shell = copy.deepcopy(model, empty)
        names = getattr(model, "_no_split_modules", None) or ()
        for block in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(block, mesh=mesh, ignored_params=kept)
        fully_shard(root, mesh=mesh, reshard_after_forward=model.training is False, ignored_params=kept)

    @contextlib.contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model's copy with all its weights, on every process; entered by all at once."""
        with together():
            for mine, copied in zip(self.model.parameters(), self.shell.parameters()):
                copied.data = whole(mine)
        try:
            yield self.shell
        finally:
            for copied in self.shell.parameters():
                copied.data = copied.new_empty(0)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor in shards."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class FullySharded:
    """The engine of students that do not fit a process with their gradient and optimiser state."""

    def __init__(self, loss: StudentLoss, processes: Processes, mesh: DeviceMesh) -> None:
        self.processes = processes
        self.shards = Shards(loss, loss.student, mesh, set())
        self.loss = loss
        register_fsdp_forward_method(loss, "logprobs")
        for group in loss.modules():
            if isinstance(group, FSDPModule):  # no mean: the loss is divided by the tokens of all processes already
                group.set_gradient_divide_factor(1.0)
                group.set_force_sum_reduction_for_comms(True)
        self.parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]

    def forward(self, *arguments: Any) -> Any:
        with meeting():
            return self.loss(*arguments)

    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        with meeting():
            found = self.loss.logprobs(batch, temperature)
        assert isinstance(self.loss, FSDPModule)
        self.loss.reshard()  # no backward pass will
        return found

    def backward(self, loss: Tensor) -> None:
        with meeting():
            loss.backward()

    def reduce(self) -> None:
        pass

    def clip(self, max_norm: float) -> float:
        with together():
            return whole(nn.utils.clip_grad_norm_(self.parameters, max_norm)).item()

    def finite(self) -> bool:
        with together():
            return bool(whole(nn.utils.get_total_norm(self.parameters, math.inf)).isfinite())

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        return self.shards.whole()

    def weights(self) -> dict[str, Tensor]:
        gathered: dict[int, Tensor] = {}  # by parameter, so that tied ones stay one
        weights = {}
        with together():
            for name, tensor in self.shards.model.state_dict(keep_vars=True).items():
                if id(tensor) not in gathered:
                    one = whole(tensor)
                    gathered[id(tensor)] = one.cpu() if self.processes.main else one.new_empty(0)
                weights[name] = gathered[id(tensor)]
        return weights if self.processes.main else {}

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> Any:
        if not optimizer.state:  # before the first update; asking for its state would make one
            return None
        state = get_optimizer_state_dict(self.loss, optimizer)
        with sharing(folder):
            # The settings of its groups are the config's. Without them there are tensors alone, and no pickles.
            dcp.save({"state": state["state"]}, checkpoint_id=str(folder / SHARDS))
        return None

    def load_optimizer(self, optimizer: Optimizer, folder: Path, state: Any) -> None:
        if not (folder / SHARDS).is_dir():
            return
        own = get_optimizer_state_dict(self.loss, optimizer)
        with sharing(folder):
            dcp.load({"state": own["state"]}, storage_reader=Reader(str(folder / SHARDS)))
        set_optimizer_state_dict(self.loss, optimizer, own)


@contextlib.contextmanager
def sharing(folder: Path) -> Iterator[None]:
    """Around what all processes write or read in one folder: makes of the failure of any a UserError on all."""
    try:
        yield
    except dcp.CheckpointException as error:
        reasons = "; ".join(f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise UserError(
            f"the processes cannot share {folder}: {reasons}. All hosts need output_dir under the same path. What "
            "was written is whole: go on with --resume_from_checkpoint auto, or name another checkpoint"
        ) from error


class Reader(dcp.FileSystemReader):
    """Reads what `FullySharded` writes, and nothing that could run code: its list of tensors is a pickle."""

    ALLOWED = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *(
                    "Metadata",
                    "TensorStorageMetadata",
                    "BytesStorageMetadata",
                    "TensorProperties",
                    "ChunkStorageMetadata",
                ),
                *("MetadataIndex", "_MEM_FORMAT_ENCODING", "StorageMeta"),
            )
        }
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # of Python 3.13
        }
        | {("torch", str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    )

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in Reader.ALLOWED:
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            return super().find_class(module, name)

    def read_metadata(self, *arguments: Any, **options: Any) -> dcp.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = self.Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def shard_teacher(teacher: LocalTeacher, mesh: DeviceMesh) -> None:
    """Puts the teacher's body into shards; its head stays whole in every process, as the loss needs it."""
    shards = Shards(teacher.body, teacher.model, mesh, {teacher.model.get_output_embeddings().weight})
    teacher.sampler.whole = shards.whole
