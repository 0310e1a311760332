"""Which tiles, warps and stages are fastest on this GPU.

    PYTHONPATH=kernels:. python benchmarks/gpu_tune.py [--output FILE]

Decode of a batch with pages of bfloat16 and FP8, and the prefill of one prompt, each with every
launch that its kernel can be compiled to. A launch counts only if its result is right, and the one
the kernel chooses by itself is marked. ``decode_launches`` and ``kept_prefill.triton.LAUNCHES`` are
where a better one goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu import (
    SHAPES,
    SMOKE,
    WRONG,
    Case,
    call_once,
    environment,
    make_case,
    run_decode,
    run_prefill,
    time_ms,
)
from record import ROOT, write
from sepllm_kernels.paged.decode import triton as decode
from sepllm_kernels.paged.launches import Launch
from sepllm_kernels.paged.prefill import triton as prefill

CONTEXT, BATCH = 32768, 64
TILES, WARPS, STAGES, PROGRAMS = (32, 64, 128), (2, 4, 8), (3, 5, 7), (2, 4, 6, 10)
ROWS = (64, 128)


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Globals of a kernel's module, for as long as it lasts."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def measure(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Time of a launch, or why it has none."""
    try:
        row = run()
    except Exception as error:  # too much shared memory, most often
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    if row["relative_error"] >= WRONG:
        return {"failed": f"relative error {row['relative_error']:.1e}"}
    return {"ms": row["ms"], "relative_error": row["relative_error"]}


def tune_decode(case: Case, time: Callable[..., float]) -> Iterator[dict[str, Any]]:
    """Every launch with the programs there are now, then other numbers of programs."""
    size = case.pages.key.element_size()
    group = case.shape.num_heads // case.shape.num_kv_heads
    tile = decode.tile_entries(case.shape.head_size, size)
    rows = max(16, group)
    own = {"TILE": tile}
    own |= decode.decode_launches(rows, case.shape.head_size, size, tile)[0].options
    for tile, warps, stages in product(TILES, WARPS, STAGES):
        launch = Launch(rows, warps, stages)
        chosen = {"TILE": tile, **launch.options}
        given = {"decode_launches": lambda *_, launch=launch: (launch,)}
        with replaced(decode, tile_entries=lambda *_, tile=tile: tile, **given):
            row = measure(lambda: run_decode(case, time, False))
        yield {**chosen, "own": chosen == own, **row}
    for programs in PROGRAMS:
        with replaced(decode, PROGRAMS=programs):
            row = measure(lambda: run_decode(case, time, False))
        yield {**own, "programs": programs, "own": programs == decode.PROGRAMS, **row}


def tune_prefill(case: Case, time: Callable[..., float]) -> Iterator[dict[str, Any]]:
    """Every launch and size of a block of rows."""
    size = max(2, case.pages.key.element_size())
    own = {"TILE": prefill.tile_entries(case.shape.head_size, size)}
    own |= {"rows": prefill.LAUNCHES[0].rows, **prefill.LAUNCHES[0].options}
    for rows, tile, warps, stages in product(ROWS, TILES[1:], WARPS[1:], STAGES[:2]):
        launch = Launch(rows, warps, stages)
        chosen = {"TILE": tile, "rows": rows, **launch.options}
        given = {"tile_entries": lambda *_, tile=tile: tile}
        with replaced(prefill, LAUNCHES=(launch,), **given):
            row = measure(lambda: run_prefill(case, time, False))
        yield {**chosen, "own": chosen == own, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu_tune.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no times: a test")
    args = parser.parse_args()
    shape, device, context, batch, time = SHAPES[0], "cuda", CONTEXT, BATCH, time_ms
    if args.smoke:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape, context, batch, time = SMOKE, 320, 2, call_once
    found = []
    for name, tokens, page_dtype, tune in (
        ("decode", 1, torch.bfloat16, tune_decode),
        ("decode, FP8 pages", 1, torch.float8_e4m3fn, tune_decode),
        ("prefill", context, torch.bfloat16, tune_prefill),
        ("prefill, FP8 pages", context, torch.float8_e4m3fn, tune_prefill),
    ):
        requests = batch if tokens == 1 else 1
        case = make_case(shape, context, requests, tokens, device, page_dtype=page_dtype)
        for row in tune(case, time):
            found.append({"op": name, "context": context, "batch": requests, **row})
            mark = "<" if row["own"] else " "
            result = row.get("failed") or f"{row['ms']:8.4f} ms"
            known = ("op", "context", "batch", "own", "ms", "failed", "relative_error")
            launch = " ".join(f"{key} {x}" for key, x in found[-1].items() if key not in known)
            print(f"{name:18} {launch:52} {mark} {result}", flush=True)
            write(args.output, {**environment(), "results": found})
        del case
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
