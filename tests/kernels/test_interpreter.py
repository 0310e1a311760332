"""What ``tests/interpreter.py`` adds to Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled"),
]


@triton.jit
def _multiply(numbers, factor):
    index = tl.arange(0, 4)
    tl.store(numbers + index, tl.load(numbers + index) * factor)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_overflow(dtype):
    """A product that its type has no room for is an error, not another number."""
    numbers = torch.tensor([1, 2, 3, 1 << 20], dtype=dtype)
    if dtype == torch.int32:
        with pytest.raises(Exception, match="mul of int32"):
            _multiply[(1,)](numbers, 1 << 11)
    else:
        _multiply[(1,)](numbers, 1 << 11)
        assert numbers[-1] == 1 << 31
