"""The processes of a data-parallel run, and the signals that end one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from sgopd.config import Config, LostProcess, UserError

T = TypeVar("T")


class Processes:
    """What the loop asks of accelerate: device, rank, trackers, and a few sums over all processes.

    Models are not wrapped: how they lie over the processes is an engine's to say (sgopd/engines).
    """

    def __init__(self, config: Config) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        wanted = [config.report_to] if isinstance(config.report_to, str) else config.report_to
        trackers = [name for name in wanted if name != "none"]
        available = [str(name) for name in get_available_trackers()]
        for name in trackers:
            if name not in available:
                raise UserError(
                    f"report_to: {name!r} is not installed, or not known to accelerate; installed: "
                    f"{', '.join(available) or 'none'}. Install it, or use none: metrics.jsonl is always written"
                )
        self.accelerator = Accelerator(cpu=config.use_cpu, log_with=trackers or None, project_dir=config.output_dir)
        kind, precision = self.accelerator.distributed_type, self.accelerator.mixed_precision
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise UserError(
                f"accelerate was launched with {kind.value}, which this loop does not use. Start it with torchrun; "
                "fsdp: true puts the student into shards"
            )
        if precision != "no" and not (config.bf16 and precision == "bf16"):
            raise UserError(
                f"accelerate was launched with mixed precision {precision!r}, and bf16 is {config.bf16} in the config, "
                "which decides. Make them agree (fp16 and fp8 are not supported)"
            )
        self.device = self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main process; every process returns its result or raises its UserError."""
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = work()
            except UserError as error:
                result[1] = str(error)
        if self.count > 1:
            with together():
                broadcast_object_list(result)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.count == 1:
            return items
        with together():
            return gather_object(items)

    def sum(self, number: int) -> int:
        return sum(self.gather([number]))

    def any(self, number: int | None) -> int | None:
        """A number that any process has, where the others have None."""
        return next((one for one in self.gather([number]) if one is not None), None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what all processes do at once: makes of the failure to meet the others a UserError that says so."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from error


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Around a computation in which the processes meet: as `together`, but its own errors stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower():
            raise lost(error) from error
        raise


def lost(error: RuntimeError) -> LostProcess:
    return LostProcess(
        f"lost another process of this run ({str(error).splitlines()[0]}): its own last words say why. Start all "
        "of them again, with --resume_from_checkpoint auto"
    )


class Interrupt:
    """Notes SIGTERM and SIGINT instead of dying, so that the loop can save and leave; a second one raises."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
