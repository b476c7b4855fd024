"""What the doors ask of an argument. An error names it, what came, what was expected and, where it helps, a remedy."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Beyond these fp32 has no reciprocal.
SMALLEST, LARGEST = 1e-30, 1e30
WHOLE = 2**53  # up to here a whole number is a float


def number(
    name: str, value: Any, expected: str = "a finite number", low: float = -math.inf, high: float = math.inf
) -> float:
    """Python's and NumPy's real numbers between `low` and `high`, as float; neither bool, NaN, text nor a tensor."""
    real = isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)
    exact = value if isinstance(value, int) or not real else float(value)  # a huge int is no float
    if not real or not low < exact < high or not abs(exact) <= sys.float_info.max:
        remedy = "; pass x.item()" if isinstance(value, Tensor) and value.numel() == 1 else ""
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}{remedy}")
    return float(value)


def positive(name: str, value: Any, smallest: float = SMALLEST, largest: float = LARGEST) -> float:
    got = number(name, value, "a finite number > 0", 0.0)
    if not smallest <= got <= largest:
        raise ValueError(f"{name} must be a number > 0 between {smallest:g} and {largest:g}, got {got}")
    return got


def scale(name: str, value: Any) -> float:
    """A factor of logits: what is left of fp32's digits of a logit beyond 1e6 is no log-probability."""
    return positive(name, value, 1e-6, 1e6)


def integer(name: str, value: Any, expected: str, low: int = -WHOLE) -> int:
    """A whole number in [low, 2^53], no bool."""
    whole = isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)
    if not whole or not low <= value <= WHOLE:
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}")
    return int(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The choice itself: an equal `value` may be of a subclass of str, as an Enum's member, which prints as another."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")
    return choices[choices.index(value)]


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> Tensor:
    """A dense tensor of one of `dtypes`, on `device`; the very object."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor ({_names(dtypes)}), got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one: pass a padded or to_dense() copy")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {_names(dtypes)}, got {_names((value.dtype,))}: convert it")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, token_ids on {device}: move one")
    return value


def constant(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Tensor:
    """A tensor of few values, from wherever it is: on `device`, detached."""
    tensor(name, value, dtypes)
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on meta, where there are no values; token_ids are on {device}")
    return value.detach().to(device)


def require(ok: Tensor, message: str, got: Callable[[], str] | None = None) -> None:
    """Raises ValueError unless all of `ok` hold. A CUDA device, which the host would wait for, asserts it itself."""
    if ok.device.type in ("cuda", "meta") or torch.compiler.is_compiling():
        torch._assert_async(ok.all(), message)
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(ok):  # vmap hides what its tensors hold
        ok, got = torch._C._functorch.get_unwrapped(ok), None
    if not bool(ok.all()):
        raise ValueError(message if got is None else f"{message}; {got()}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of many digits"
    return text if len(text) < 80 else text[:77] + "..."
