"""Which launch of a kernel a GPU has the shared memory for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from triton.runtime.errors import OutOfResources


@dataclass(frozen=True)
class Launch:
    """How an attention kernel is compiled.

    Attributes:
        rows: packed query rows of a program.
        num_warps: of a program.
        num_stages: of the loop over tiles.
    """

    rows: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Triton's."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_found: dict[Hashable, int] = {}


def launch_first_that_fits(
    key: Hashable, launches: Sequence[Launch], run: Callable[[Launch], None]
) -> None:
    """Run with the first of ``launches`` whose shared memory the GPU has.

    An H200 has 227 KiB for a program, an A100 163, most others 99. What did not fit is not tried
    again for the same ``key``; engines run each kernel before they capture CUDA graphs of it.

    Args:
        key: all that the kernel is compiled for, and the device.
        launches: the best one first.
        run: launches the kernel.

    Raises:
        OutOfResources: not even the last one fits.
    """
    key = key, tuple(launches)
    first = _found.get(key, 0)
    for index in range(first, len(launches)):
        try:
            run(launches[index])
        except OutOfResources:
            if index == len(launches) - 1:
                raise
        else:
            _found[key] = index
            return
