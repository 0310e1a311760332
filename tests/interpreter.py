"""Triton's interpreter, which runs kernels on a CPU, with its errors of version 3.9 mended."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Have it compute what a GPU would. Does nothing the second time."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "is_mended"):
        interpreter.is_mended = True
        _take_masks_of_integers(interpreter)
        _multiply_bfloat16(interpreter)
        _round_to_nearest(interpreter)


def _take_masks_of_integers(interpreter: Any) -> None:
    """``&`` of a scalar and a vector of booleans is one of integers, which loads then refuse.
    vLLM's ngram kernel has such a mask."""
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def create_masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        as_bool = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return load(self, pointers, as_bool, *args)

    builder.create_masked_load = create_masked_load


def _multiply_bfloat16(interpreter: Any) -> None:
    """``tl.dot`` multiplies the bits of bfloat16 numbers. Their products are exact in float32,
    which is what a GPU adds up."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        numbers = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widened(a), widened(b), *args)

    builder.create_dot = create_dot


def _round_to_nearest(interpreter: Any) -> None:
    """float32 becomes bfloat16 by cutting bits off, and FP8 without carrying into the exponent."""
    import triton.language as tl

    types = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    convert = interpreter._convert_float

    def _convert_float(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in types or target not in types:
            return convert(numbers, source, target, rounding)
        result = torch.from_numpy(numbers.copy()).view(types[source]).to(types[target])
        return result.view(bits[result.element_size()]).numpy()

    interpreter._convert_float = _convert_float
