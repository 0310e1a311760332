"""Which tiles, warps and stages are fastest on this GPU.

    PYTHONPATH=kernels:. python benchmarks/gpu_tune.py [--operations decode packed] [--output FILE]

Decode of a batch with pages of bfloat16 and FP8, the prefill of one prompt, and the passes of
training, each with every launch that its kernel can be compiled to. A launch counts only if its
result is right, and the one the kernel chooses by itself is marked. A better one goes into
``decode_launches``, or ``LAUNCHES`` of ``paged.prefill.triton``, or ``sequence.packed.triton``.

Compiling takes most of the time. Several processes with ``--share 0/8``, ``1/8`` and so on compile
a part each, at a short context, and time nothing; what they compiled is found again afterwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import training as texts
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
from sepllm_kernels.sequence.packed import triton as packed

from vllm_sepllm.training.plan import TextPlan, pack

CONTEXT, BATCH = 32768, 64
SMALL_CONTEXT = 2048  # of a process that only compiles
TILES, WARPS, STAGES, PROGRAMS = (64, 128), (2, 4, 8), (3, 5, 7), (3, 6, 9, 12, 18, 24)
ROWS = (64, 128)
PACKED_STAGES = (2, 3)
OPERATIONS = ("decode", "fp8", "prefill", "packed")
Measured = Iterator[dict[str, Any]]


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
    if not row["relative_error"] < WRONG:  # nor is nan
        return {"failed": f"relative error {row['relative_error']:.1e}"}
    return {"ms": row["ms"], "relative_error": row["relative_error"]}


def share_of(launches: Sequence[Any], share: tuple[int, int]) -> Sequence[Any]:
    """Those that a process compiles."""
    return launches[share[0] :: share[1]]


def tune_decode(case: Case, time: Callable[..., float], share: tuple[int, int]) -> Measured:
    """Every launch with the programs there are now, then other numbers of programs."""
    size = case.pages.key.element_size()
    group = case.shape.num_heads // case.shape.num_kv_heads
    tile = decode.tile_entries(case.shape.head_size, size)
    rows = max(16, group)
    own = {"TILE": tile}
    own |= decode.decode_launches(rows, case.shape.head_size, size, tile)[0].options
    for tile, warps, stages in share_of(list(product(TILES, WARPS, STAGES)), share):
        launch = Launch(rows, warps, stages)
        chosen = {"TILE": tile, **launch.options}
        given = {"decode_launches": lambda *_, launch=launch: (launch,)}
        with replaced(decode, tile_entries=lambda *_, tile=tile: tile, **given):
            row = measure(lambda: run_decode(case, time, False))
        yield {**chosen, "own": chosen == own, **row}
    for programs in PROGRAMS if share == (0, 1) else ():
        with replaced(decode, PROGRAMS=programs):
            row = measure(lambda: run_decode(case, time, False))
        yield {**own, "programs": programs, "own": programs == decode.PROGRAMS, **row}


def tune_prefill(case: Case, time: Callable[..., float], share: tuple[int, int]) -> Measured:
    """Every launch and size of a block of rows."""
    size = max(2, case.pages.key.element_size())
    own = {"TILE": prefill.tile_entries(case.shape.head_size, size)}
    own |= {"rows": prefill.LAUNCHES[0].rows, **prefill.LAUNCHES[0].options}
    for rows, tile, warps, stages in share_of(
        list(product(ROWS, TILES, WARPS[1:], STAGES[:2])), share
    ):
        launch = Launch(rows, warps, stages)
        chosen = {"TILE": tile, "rows": rows, **launch.options}
        given = {"tile_entries": lambda *_, tile=tile: tile}
        with replaced(prefill, LAUNCHES=(launch,), **given):
            row = measure(lambda: run_prefill(case, time, False))
        yield {**chosen, "own": chosen == own, **row}


def tune_packed(
    length: int, time: Callable[..., float], share: tuple[int, int], device: str
) -> Measured:
    """The passes of training one by one: forward, queries' gradients, keys' and values'.

    A result is right if it is that of the launch that fits everywhere.
    """
    plans = [TextPlan.of(text, texts.rule_of(256)) for text in texts.texts_of(texts.book(), length)]
    plan = pack(plans, device)
    heads = (plan.num_tokens, texts.NUM_HEADS, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value, grad = (torch.randn(heads, dtype=dtype, device=device) for _ in range(4))
    call = packed.Call(query, key, value, plan, 0.125)
    kept = call.kept()
    output, log_sums = call.forward(kept)
    given = grad, log_sums, call.deltas(output, grad)
    passes: dict[str, Callable[[], torch.Tensor]] = {
        "FORWARD": lambda: call.forward(kept)[0],
        "QUERY_GRADIENT": lambda: call.query_gradient(kept, given),
        "KEY_GRADIENT": lambda: call.key_gradients(kept, given)[0],
    }
    for name, run in passes.items():
        with replaced(packed, **{name: packed.LAST[:1]}):
            expected = run().float()

        def timed(run: Any = run, expected: Any = expected) -> dict[str, Any]:
            error = (run().float() - expected).abs().max() / expected.abs().max()
            return {"relative_error": float(error), "ms": time([run])}

        choices = product(ROWS, TILES, WARPS[1:], PACKED_STAGES)
        for rows, tile, warps, stages in share_of(list(choices), share):
            launch = packed.TiledLaunch(rows, warps, stages, tile)
            own = launch == getattr(packed, name)[0]
            with replaced(packed, **{name: (launch,)}):
                yield {"pass": name, **launch.options, "own": own, **measure(timed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--share", default="0/1", help="compile this part of the launches only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu_tune.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no times: a test")
    args = parser.parse_args()
    number, count = (int(part) for part in args.share.split("/"))
    shape, device, context, batch, time = SHAPES[0], "cuda", CONTEXT, BATCH, time_ms
    if count > 1:
        context, time = SMALL_CONTEXT, call_once
    if args.smoke:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape, context, batch, time = SMOKE, 320, 2, call_once
    found: list[dict[str, Any]] = []

    def note(name: str, rows: Measured) -> None:
        for row in rows:
            found.append({"op": name, **row})
            mark = "<" if row["own"] else " "
            result = row.get("failed") or f"{row['ms']:8.4f} ms"
            known = ("op", "own", "ms", "failed", "relative_error")
            launch = " ".join(f"{key} {x}" for key, x in found[-1].items() if key not in known)
            print(f"{name:18} {launch:52} {mark} {result}", flush=True)
            if count == 1:
                sizes = {"context": context, "batch": batch}
                write(args.output, {**environment(), **sizes, "results": found})

    for name, tokens, page_dtype, tune, operation in (
        ("decode", 1, torch.bfloat16, tune_decode, "decode"),
        ("decode, FP8 pages", 1, torch.float8_e4m3fn, tune_decode, "fp8"),
        ("prefill", context, torch.bfloat16, tune_prefill, "prefill"),
        ("prefill, FP8 pages", context, torch.float8_e4m3fn, tune_prefill, "prefill"),
    ):
        if operation in args.operations:
            requests = batch if tokens == 1 else 1
            case = make_case(shape, context, requests, tokens, device, page_dtype=page_dtype)
            note(name, tune(case, time, (number, count)))
            del case
    if "packed" in args.operations:
        length = 192 if args.smoke else 8192
        note("packed", tune_packed(length, time, (number, count), device))
    if count == 1:
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
