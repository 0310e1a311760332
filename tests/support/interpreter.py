"""Triton's interpreter, which runs kernels on a CPU, with its errors of version 3.9 mended."""

from __future__ import annotations

import math
from types import SimpleNamespace
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
        _find_overflows(interpreter)
        _adapt_language_once(interpreter)
        _remember_types(interpreter)
        _make_room_on_the_stack(interpreter)


def _take_masks_of_integers(interpreter: Any) -> None:
    """``&`` of a scalar and a vector of booleans is one of integers, which loads and stores then
    refuse. vLLM's ngram kernel has such a mask."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        return load(self, pointers, as_bool(mask), *args)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, pointers, value, as_bool(mask), *args)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store


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


def _find_overflows(interpreter: Any) -> None:
    """Whether a sum or product of integers fits its type is worked out at length, which takes a
    third of the time, and not looked at."""
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            numbers = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
            result = functions[binary_op.__name__](*numbers)
            if result.min() < kind.get_int_min_value() or result.max() > kind.get_int_max_value():
                raise OverflowError(f"{binary_op.__name__} of {kind} in {result}")

    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = check


def _adapt_language_once(interpreter: Any) -> None:
    """At each launch and each call of a function of a kernel, the language's functions are looked
    for and replaced by those of the interpreter, which takes half of the time. Here they stay."""
    import triton.language as tl

    adapt = interpreter._patch_lang
    adapted: list[Any] = []

    def _patch_lang(fn: Any) -> Any:
        if not adapted:
            module = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
            adapted.append(adapt(module))
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = _patch_lang


def _remember_types(interpreter: Any) -> None:
    """Each value gets a type, a shape and a size of its own, made and checked anew, which takes
    another third of the time. There are few: they are made once."""
    import triton.language as tl

    core, semantic = tl.core, type(interpreter.interpreter_semantic)
    find_dtype, is_fitting = interpreter._get_np_dtype, interpreter._validate_np_data_size
    make_type, broadcast = core.block_type.__init__, semantic.broadcast_impl_value
    dtypes: dict[str, Any] = {}
    fitting: dict[tuple[int, str], bool] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_scalar = {"shape": core.tuple([]), "numel": core.constexpr(1)}

    def _get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = find_dtype(scalar)
        return dtypes[scalar.name]

    def _validate_np_data_size(array: Any, dtype: Any) -> bool:
        key = array.itemsize, dtype.name
        if key not in fitting:
            fitting[key] = is_fitting(array, dtype)
        return fitting[key]

    def make_block_type(self: Any, element: Any, shape: Any) -> None:
        sizes = (*(getattr(size, "value", size) for size in shape),)
        found = types.get((element.name, sizes))
        if found is None:
            make_type(self, element, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            values = [core.constexpr(size) for size in sizes]
            self.of_tensor = {
                "shape": core.tuple(values),
                "numel": core.constexpr(math.prod(sizes)),
            }
            found = types[element.name, sizes] = dict(vars(self))
        self.__dict__.update(found)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.__dict__.update(type.of_tensor if type.is_block() else of_scalar)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block() + rhs.type.is_block()
        if blocks == 0 or (blocks == 2 and lhs.type.shape is rhs.type.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    interpreter._get_np_dtype = _get_np_dtype
    interpreter._validate_np_data_size = _validate_np_data_size
    core.block_type.__init__ = make_block_type
    core.tensor.__init__ = make_tensor
    semantic.broadcast_impl_value = broadcast_impl_value


def _make_room_on_the_stack(interpreter: Any) -> None:
    """Python's stack grows in pieces of 16 KiB, mapped when a call needs one and unmapped at its
    end: a loop at the edge of one does so all the time. A frame of 72 KB gets a piece of 128 KiB,
    which has room for all calls of a kernel."""
    executor = interpreter.GridExecutor
    launch = executor.__call__
    names = " = ".join(f"unused{i}" for i in range(9000))
    scope: dict[str, Any] = {}
    exec(f"def call(f, *args, **kwargs):\n    return f(*args, **kwargs)\n    {names} = 0", scope)
    call = scope["call"]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        call(launch, self, *args, **kwargs)

    executor.__call__ = __call__
