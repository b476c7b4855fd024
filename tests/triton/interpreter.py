"""Triton's interpreter, made fit for these kernels. Import it before anything imports Triton.

- TRITON_INTERPRET is read when a kernel is defined.
- fp32 becomes bf16 by truncation there; devices round to nearest, even.
- tl.dot of bf16 operands multiplies their bit patterns there: they are widened first.
- Triton 3.6 makes loop bounds of one-element arrays, which NumPy 2.4 no longer turns into a number.
- every call of a device function patches triton.language again, a millisecond each: once a launch is enough.
"""

from __future__ import annotations

import os
import sys
from typing import Any

assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "Triton was imported before"
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_patch_lang_tensor = interpreter._patch_lang_tensor
_patched: set[str] = set()  # modules of device functions, in the launch that runs


def _patch_once(fn: Any) -> Any:
    module = fn.__globals__["__name__"]
    if module in _patched:
        return interpreter._LangPatchScope()
    _patched.add(module)
    return _patch_lang(fn)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _fresh_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source.name != "fp32" or target.name != "bf16":
        return _convert_float(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _wide(operand: Any) -> Any:
    if operand.dtype.scalar.name != "bf16":
        return operand
    bits = operand.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def _dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
    return _create_dot(self, _wide(a), _wide(b), *args)


interpreter._patch_lang = _patch_once
interpreter._patch_lang_tensor = _patch_tensor
interpreter._convert_float = _convert
interpreter.GridExecutor.__call__ = _fresh_launch
interpreter.InterpreterBuilder.create_dot = _dot
