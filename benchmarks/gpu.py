"""Each kernel on a GPU, beside dense attention and the memory's own speed, in one run.

    PYTHONPATH=kernels:. python benchmarks/gpu.py [--contexts 4096 32768] [--batches 8 64]
        [--shapes Llama-3-8B] [--others FlashAttention-3 "vLLM Triton"] [--output FILE]

Needs torch, Triton and a tokenizer library; other attention kernels are compared if they are
installed (vLLM's Triton and FlashAttention kernels, torch otherwise). What is kept follows from the
text of a PG19 book. Times are medians of CUDA-graph replays over inputs that take turns, so that
none is left in the L2 cache, of dense kernels too; a result counts only if it is that of float32
attention over an explicit mask. The file is written anew with every row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import shapes as texts
import torch
from gpu_dense import DENSE_KERNELS
from record import ROOT, provenance, write
from sepllm_kernels.batch import KeptBatch, PagedKV
from sepllm_kernels.kept_metadata import kept_metadata
from sepllm_kernels.paged.decode.triton import (
    DecodeBuffers,
    kept_decode,
    make_plan,
    plan_for,
    processors,
)
from sepllm_kernels.paged.prefill.triton import kept_prefill_paged
from sepllm_kernels.rotate_queries import rotate_queries
from sepllm_kernels.write_kv import write_kv

WINDOW, SINKS, PAGE = 256, 4, 16
LAYERS = 32  # of a model: metadata is made once for all
EVERYTHING_CONTEXT = 32768  # where decode is also measured with all tokens kept
L2_BYTES = 200 << 20  # inputs that take turns are together larger than any L2 cache
MOST_TURNS = 512
REPLAYS = 15
CALLS = 8  # of a graph at least, which spreads the launch of the graph
WRONG = 0.01  # relative error: bfloat16 rounds weights and results by 0.004


@dataclass(frozen=True)
class Shape:
    """Heads of one layer on one GPU."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def entry_elements(self) -> int:
        """Of the key and the value of one token."""
        return 2 * self.num_kv_heads * self.head_size


SHAPES = (Shape("Llama-3-8B", 32, 8, 128), Shape("Llama-3-70B, 1 of 8 GPUs", 8, 1, 128))
SMOKE = Shape("smoke", 4, 2, 64)


@dataclass
class Case:
    """One batch: dense keys and values of all positions, and the pages SepLLM holds of them."""

    shape: Shape
    query: torch.Tensor  # [num_tokens, num_heads, head_size]
    key: torch.Tensor  # [batch, context, num_kv_heads, head_size]
    value: torch.Tensor
    kept: torch.Tensor  # [batch, context] bool
    pages: PagedKV
    batch: KeptBatch

    @property
    def entries_seen(self) -> int:
        """Keys and values that the last token of each request must read, and those alone."""
        seen = self.batch.stream_ranges[self.batch.query_start[1:].long() - 1, 1].sum()
        return int(seen + self.batch.seq_lens.clamp(max=WINDOW).sum())

    @property
    def bytes_seen(self) -> int:
        """What they take."""
        per_element = self.pages.key.element_size()
        return self.entries_seen * self.shape.entry_elements * per_element


def make_case(
    shape: Shape,
    context: int,
    num_reqs: int,
    tokens: int,
    device: str,
    everything: bool = False,
    page_dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """``num_reqs`` requests of ``context`` tokens, the last ``tokens`` of each in the batch.

    What is kept is what is in a book, or ``everything``. Dense keys and values are what pages of
    ``page_dtype`` hold of them.
    """
    rng = torch.Generator(device).manual_seed(0)
    sizes = (num_reqs, context, shape.num_kv_heads, shape.head_size)
    dtype = {"dtype": torch.bfloat16, "device": device, "generator": rng}
    key, value = (torch.randn(sizes, **dtype).to(page_dtype).bfloat16() for _ in range(2))
    query = torch.randn(num_reqs * tokens, shape.num_heads, shape.head_size, **dtype)
    kept = torch.from_numpy(texts.kept_flags(num_reqs, context, SINKS)).to(device) | everything
    prefix = torch.nn.functional.pad(kept.cumsum(1), (1, 0)).int()
    position = torch.arange(context - tokens, context, device=device)
    limits = prefix[:, (position - WINDOW + 1).clamp(min=0)]
    ranges = torch.stack([torch.zeros_like(limits), limits], -1).flatten(0, 1)
    first = max(0, context - tokens - WINDOW + 1) // PAGE
    window_pages, width = -(-context // PAGE) - first, -(-context // PAGE)
    kept_pages = int(-(-limits.max() // PAGE))
    total = num_reqs * (window_pages + kept_pages)
    order = torch.randperm(total, generator=rng, device=device).int() + 1
    stored = torch.empty(
        total + 1,
        shape.num_kv_heads,
        PAGE,
        2 * shape.head_size,
        dtype=torch.bfloat16,
        device=device,
    )
    tables = torch.zeros(2, num_reqs, width, dtype=torch.int32, device=device)
    split = num_reqs * window_pages
    tables[0, :, first:] = order[:split].view(num_reqs, window_pages)
    tables[1, :, :kept_pages] = order[split:].view(num_reqs, kept_pages)
    for req in range(num_reqs):
        both = torch.cat([key[req], value[req]], -1)  # [context, heads, 2 * size]
        entries = both[kept[req]][: kept_pages * PAGE]
        fill_pages(stored, tables[0, req, first:], both[first * PAGE :])
        fill_pages(stored, tables[1, req], entries)
    index = {"dtype": torch.int32, "device": device}
    batch = KeptBatch(
        query_start=torch.arange(0, num_reqs * tokens + 1, tokens, **index),
        seq_lens=torch.full((num_reqs,), context, **index),
        window_table=tables[0],
        kept_table=tables[1],
        stream_ranges=ranges.int().contiguous(),
        window_size=WINDOW,
        num_sinks=0,
        max_query_len=tokens,
    )
    pages = PagedKV(*stored.to(page_dtype).tensor_split(2, -1))
    return Case(shape, query, key, value, kept, pages, batch)


def fill_pages(stored: torch.Tensor, table: torch.Tensor, content: torch.Tensor) -> None:
    """Write ``[num_entries, heads, size]`` to the pages of ``table``, in order."""
    pages = -(-len(content) // PAGE)
    padded = torch.nn.functional.pad(content, (0, 0, 0, 0, 0, pages * PAGE - len(content)))
    stored[table[:pages].long()] = padded.view(pages, PAGE, *content.shape[1:]).transpose(1, 2)


def exact(case: Case, requests: Sequence[int], offsets: Sequence[int]) -> torch.Tensor:
    """Float32 attention of some tokens of some requests over what they see."""
    shape, context = case.shape, case.key.shape[1]
    tokens = case.query.shape[0] // case.key.shape[0]
    rows = []
    for req in requests:
        for offset in offsets:
            position = context - tokens + offset
            seen = case.kept[req].clone()
            seen[max(0, position - WINDOW + 1) : position + 1] = True
            seen[position + 1 :] = False
            group = shape.num_heads // shape.num_kv_heads
            key = case.key[req, seen].float().repeat_interleave(group, 1)
            value = case.value[req, seen].float().repeat_interleave(group, 1)
            query = case.query[req * tokens + offset].float()
            logits = torch.einsum("hd,khd->hk", query, key) * shape.head_size**-0.5
            rows.append(torch.einsum("hk,khd->hd", logits.softmax(-1), value))
    return torch.stack(rows)


def relative_error(case: Case, output: torch.Tensor) -> float:
    """Largest error of a few tokens, over the largest result: of a prompt the first, the last, and
    some between, where the window begins to leave tokens out."""
    num_reqs = case.key.shape[0]
    tokens = len(case.query) // num_reqs
    requests = sorted({0, num_reqs // 2, num_reqs - 1})
    offsets = {0, WINDOW - 1, WINDOW, tokens // 2, *range(tokens - 4, tokens)}
    offsets = sorted(offsets & {*range(tokens)})
    expected = exact(case, requests, offsets)
    rows = output.reshape(num_reqs, tokens, *case.query.shape[1:])
    found = rows[requests][:, offsets].flatten(0, 1).float()
    return float((found - expected).abs().max() / expected.abs().max())


def unwritten(case: Case) -> torch.Tensor:
    """A place for results. Memory that is used again would hold the right ones of another run."""
    return torch.full_like(case.query, torch.nan)


def time_ms(calls: Sequence[Callable[[], None]]) -> float:
    """Milliseconds per call, calls taking turns."""
    calls = list(calls) * -(-CALLS // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per second of a copy, read and written ones together."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    # A kernel that copies: a copy that a graph holds as such is slower.
    milliseconds = time_ms([lambda: torch.add(source, 0.0, out=target)])
    return 2 * source.nbytes / (milliseconds / 1000)


def copies_of(nbytes: int) -> int:
    """So many of an input of ``nbytes`` do not fit the L2 cache."""
    most = MOST_TURNS if torch.cuda.is_available() else 2
    return min(most, -(-L2_BYTES // max(nbytes, 1)))


def turns(case: Case) -> list[Case]:
    """The same case over copies of its pages, so that together they do not fit the L2 cache."""
    count = copies_of(case.bytes_seen)
    key, value = (x.view(torch.uint8) for x in (case.pages.key, case.pages.value))
    stored = torch.cat([key, value], -1).view(case.pages.key.dtype)
    halves = [stored.clone().tensor_split(2, -1) for _ in range(count)]
    return [replace(case, pages=PagedKV(*pair)) for pair in halves]


def run_decode(
    case: Case, time: Callable[..., float], beside_others: bool = True
) -> dict[str, Any]:
    """One decode row: ours, its error, and dense kernels on the same tokens."""
    shape, scale = case.shape, case.shape.head_size**-0.5
    output = unwritten(case)
    device = case.query.device
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_size
    buffers = DecodeBuffers(1, *sizes, processors(device), device)
    key, batch = case.pages.key, case.batch
    heads = shape.num_kv_heads, shape.head_size, key.element_size()
    plan = plan_for(len(batch.seq_lens), *heads, device)
    lengths = batch.query_start, batch.seq_lens, batch.stream_ranges
    make_plan(*lengths, batch.window_size, batch.num_sinks, plan)
    calls = [
        lambda turn=turn: kept_decode(
            turn.query, turn.pages, turn.batch, output, scale, 0.0, buffers, plan
        )
        for turn in turns(case)
    ]
    row = {"ms": time(calls), "bytes": case.bytes_seen}
    row["relative_error"] = relative_error(case, output)
    row["kept_share"] = case.entries_seen / (case.key.shape[0] * case.key.shape[1])
    if beside_others:
        row["dense_ms"] = run_dense(case, time)
    return row


def run_dense(case: Case, time: Callable[..., float]) -> dict[str, float]:
    """Milliseconds of each dense kernel there is and whose result is right, over all tokens."""
    found = {}
    count = copies_of(2 * case.key.numel() * case.key.element_size())
    copies = [(case.key.clone(), case.value.clone()) for _ in range(1, count)]
    inputs = [(case.key, case.value), *copies]
    everything = replace(case, kept=torch.ones_like(case.kept))
    for name, prepare in DENSE_KERNELS.items():
        try:
            calls = [prepare(case.query, key, value, PAGE) for key, value in inputs]
            if None in calls:
                continue
            error = relative_error(everything, calls[-1]())
            if not error < WRONG:  # nor is nan
                raise ValueError(f"relative error {error:.1e}")
            found[name] = time(calls)
        except Exception as error:  # a kernel that does not run here is no comparison
            print(f"  {name}: {type(error).__name__}: {error}"[:160])
    return found


def run_prefill(
    case: Case, time: Callable[..., float], beside_others: bool = True
) -> dict[str, Any]:
    """One prompt computed as a single chunk."""
    output = unwritten(case)
    scale = case.shape.head_size**-0.5

    def call() -> None:
        kept_prefill_paged(case.query, case.pages, case.batch, output, scale)

    row: dict[str, Any] = {"ms": time([call]), "relative_error": relative_error(case, output)}
    if beside_others:
        row["dense_ms"] = run_dense(case, time)
        row["xformers"] = run_xformers(case, time)
    return row


def run_xformers(case: Case, time: Callable[..., float]) -> dict[str, Any]:
    """The same prompt with xformers for the window, or why not."""
    output = unwritten(case)
    arguments = case.query, case.pages, case.batch, output, case.shape.head_size**-0.5
    try:
        from sepllm_kernels.paged.prefill import xformers_window

        spans = xformers_window.window_spans(case.batch, PAGE)
        call = partial(xformers_window.kept_prefill_xformers, *arguments, spans=spans)
        row: dict[str, Any] = {"ms": time([call]), "relative_error": relative_error(case, output)}
    except (ImportError, NotImplementedError) as error:
        return {"absent": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row


def run_overhead(case: Case, time: Callable[..., float], decode_ms: float) -> dict[str, Any]:
    """Metadata and plan, once per step, and the write of both copies, once per layer, of a decode
    step."""
    num_reqs, context = case.kept.shape
    device = case.query.device
    prefix = torch.zeros(num_reqs, context + 1, dtype=torch.int32, device=device)
    codes = torch.zeros(50_000, dtype=torch.uint8, device=device)
    slots = torch.full((num_reqs,), -1, dtype=torch.int64, device=device)
    ranges = torch.zeros(num_reqs, 2, dtype=torch.int32, device=device)
    ids = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    heads = case.shape.num_kv_heads, case.shape.head_size, case.pages.key.element_size()
    plan = plan_for(num_reqs, *heads, device)
    rows = torch.arange(num_reqs, device=device)
    batch, page = case.batch, {"page_size": PAGE, "num_sink_tokens": SINKS, "window_size": WINDOW}

    def count() -> None:
        kept_metadata(
            ids,
            batch.query_start,
            batch.seq_lens,
            rows,
            batch.kept_table,
            codes,
            prefix,
            slots,
            ranges,
            **page,
        )
        make_plan(batch.query_start, batch.seq_lens, batch.stream_ranges, WINDOW, 0, plan)

    pages = batch.window_table[:, (context - 1) // PAGE].long()
    window_slots = pages * PAGE + (context - 1) % PAGE
    key, value = case.key[:, -1].contiguous(), case.value[:, -1].contiguous()

    def write() -> None:
        write_kv(key, value, case.pages, window_slots, window_slots)

    cos_sin = torch.zeros(1, num_reqs, case.shape.head_size, device=device)

    def rotate() -> None:  # in cache positions only
        rotate_queries(case.query, cos_sin)

    metadata_ms, write_ms = time([count]), time([write])
    return {
        "metadata_ms": metadata_ms,
        "write_ms": write_ms,
        "share_of_decode": (metadata_ms + LAYERS * write_ms) / (LAYERS * decode_ms),
        "rotate_ms": time([rotate]),
    }


def environment() -> dict[str, Any]:
    """Where and with what it ran."""
    return {
        **provenance("torch", "triton", "vllm", "xformers"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "window_size": WINDOW,
        "sinks": SINKS,
        "page_size": PAGE,
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    parts = [f"{row['op']:9} {row['shape']:26} context {row['context']:6} batch {row['batch']:3}"]
    if "ms" in row:
        parts.append(f"{row['ms']:8.4f} ms")
    if row.get("share_of_copy"):
        parts.append(f"{row['bytes_per_second'] / 1e12:.2f} TB/s")
        parts.append(f"{row['share_of_copy']:5.1%} of copy bandwidth")
    if row.get("dense_ms"):
        best = min(row["dense_ms"], key=row["dense_ms"].get)
        parts.append(f"x{row['dense_ms'][best] / row['ms']:.2f} against {best}")
    if "ms" in row.get("xformers", {}):
        parts.append(f"{row['xformers']['ms']:.4f} ms with xformers")
    if "share_of_decode" in row:
        parts.append(f"{row['share_of_decode']:.1%} of a decode step")
    if "relative_error" in row:
        parts.append(f"error {row['relative_error']:.1e}")
    print("  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--others", nargs="+", choices=DENSE_KERNELS, default=DENSE_KERNELS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no times: a test")
    args = parser.parse_args()
    shapes, device, time = SHAPES, "cuda", time_ms
    if args.shapes:
        shapes = tuple(shape for shape in SHAPES if shape.name in args.shapes)
    for name in DENSE_KERNELS.keys() - set(args.others):
        del DENSE_KERNELS[name]
    if args.smoke:
        shapes, device, time = (SMOKE,), "cuda" if torch.cuda.is_available() else "cpu", call_once
        args.contexts, args.batches = [608], [2]
    bandwidth = None if args.smoke else copy_bandwidth()
    about = {**environment(), "copy_bandwidth": bandwidth}
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any], op: str, shape: Shape, context: int, batch: int) -> None:
        row = {"op": op, "shape": shape.name, "context": context, "batch": batch, **row}
        if bandwidth and "bytes" in row:
            row["bytes_per_second"] = row["bytes"] / (row["ms"] / 1000)
            row["share_of_copy"] = row["bytes_per_second"] / bandwidth
        parts = (row, row.get("xformers", {}))
        row["counts"] = all(part.get("relative_error", 0.0) < WRONG for part in parts)
        rows.append(row)
        show(row)
        write(args.output, {**about, "is_complete": False, "results": rows})

    for shape in shapes:
        for context in args.contexts:
            for batch in args.batches:
                case = make_case(shape, context, batch, 1, device)
                row = run_decode(case, time)
                add(row, "decode", shape, context, batch)
                add(run_overhead(case, time, row["ms"]), "overhead", shape, context, batch)
                del case
            if context == EVERYTHING_CONTEXT or args.smoke:
                case = make_case(shape, context, args.batches[-1], 1, device, everything=True)
                add(run_decode(case, time), "all kept", shape, context, args.batches[-1])
                del case
                fp8 = torch.float8_e4m3fn
                case = make_case(shape, context, args.batches[-1], 1, device, page_dtype=fp8)
                add(run_decode(case, time, False), "FP8 pages", shape, context, args.batches[-1])
                del case
            if context <= 32768:
                case = make_case(shape, context, 1, context, device)
                add(run_prefill(case, time), "prefill", shape, context, 1)
                del case
    failed = [row for row in rows if not row["counts"]]
    write(args.output, {**about, "is_complete": True, "results": rows})
    if bandwidth:
        print(f"copy {bandwidth / 1e12:.2f} TB/s; written to {args.output}")
    if failed:
        raise SystemExit(f"{len(failed)} results are wrong and do not count")


def call_once(calls: Sequence[Callable[[], None]]) -> float:
    """In the place of :func:`time_ms`: only that everything runs."""
    for call in calls:
        call()
    return 1.0


if __name__ == "__main__":
    main()
