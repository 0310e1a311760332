"""Compile every kernel for GPUs, without one: ``python compile_for_gpus.py``, JSON lines out.

Arguments have the types and the divisibility they have in an engine. A process of its own: in the
tests' kernels are interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from sepllm_kernels.kept_metadata.triton import SEGMENT, _kept_metadata
from sepllm_kernels.kept_metadata.triton import TILE as TOKENS
from sepllm_kernels.paged.decode.triton import MERGED, MIN_TILES, _decode, _merge, decode_launches
from sepllm_kernels.paged.decode_plan.triton import _decode_plan
from sepllm_kernels.paged.launches import Launch
from sepllm_kernels.paged.prefill.triton import LAUNCHES, _prefill
from sepllm_kernels.paged.tiles import tile_entries
from sepllm_kernels.rotate_queries.triton import _rotate_queries
from sepllm_kernels.sequence.packed import triton as packed
from sepllm_kernels.write_kv.triton import _write_kv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H200, A100, L40, B200, RTX50 = 90, 80, 89, 100, 120
SHARED_MEMORY = {H200: 227 << 10, A100: 163 << 10, L40: 99 << 10}  # bytes of a program
SHARED_MEMORY |= {B200: 227 << 10, RTX50: 99 << 10}
INDEX = {"query_start": "*i32", "seq_lens": "*i32", "window_table": "*i32", "kept_table": "*i32"}
INDEX |= {"stream_ranges": "*i32", "stream_slots": "*i64", "window_slots": "*i64", "rows": "*i64"}
INDEX |= dict.fromkeys(("sizes", "starts", "slots", "requests"), "*i32")
INDEX["plan"] = "*i32"
INDEX |= {"token_ids": "*i32", "kept_prefix": "*i32", "token_codes": "*u8", "shifts": "*i32"}
INDEX |= {"span_left": "*u8"}
FLOATS = {"partial": "*fp32", "log_sums": "*fp32", "stream_cos_sin": "*fp32", "scale": "fp32"}
FLOATS |= {"cos_sin": "*fp32", "factor": "fp32", "deltas": "*fp32"}
FLOATS |= {"stream_key_grads": "*fp32", "stream_value_grads": "*fp32"}
INDEX |= dict.fromkeys(("window_first", "stream", "sinks", "ranges", "seen"), "*i32")
INDEX |= {"sink_ranges": "*i32", "sink_seen": "*i32", "stream_entry": "*i32"}
PACKED = "queries", "keys", "values", "kept_keys", "kept_values", "output", "grads", "query_grads"
PACKED += "outputs", "key_grads", "value_grads"
FLOATS |= dict.fromkeys(("value_scale", "inverse_key_scale", "inverse_value_scale"), "fp32")
SIZES = {"bf16": 2, "fp8e4nv": 1, "fp32": 4}  # bytes of an element
TILES = re.compile(r"memdesc<(\d+)x\d+x\d+x\w+, #shared")  # of keys and values at a time
# Each takes seconds to compile, so a case is here for what it alone shows: heads, page size, type
# of pages, soft cap, GPU, rows of decode.
ATTENTION = (
    ((32, 8, 128), 16, "bf16", 0.0, H200, (16, 64)),
    ((32, 8, 128), 32, "fp8e4nv", 0.0, H200, (16,)),
    ((32, 8, 128), 16, "bf16", 0.0, A100, (16,)),
    ((32, 8, 128), 16, "bf16", 0.0, B200, (16,)),
    ((32, 8, 128), 16, "fp8e4nv", 0.0, RTX50, (16,)),
    ((32, 32, 80), 128, "bf16", 30.0, L40, (16,)),
    ((16, 16, 256), 16, "bf16", 0.0, H200, (16,)),
    ((16, 16, 256), 16, "fp32", 0.0, L40, (16,)),
    ((8, 4, 32), 16, "fp32", 0.0, H200, (16,)),  # that of the check of answers
)


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Sequence[Launch], int]]:
    """Kernel, element types by argument, constants, launches if there are several, capability."""
    for (num_heads, num_kv_heads, head_size), page, pages, cap, capability, all_rows in ATTENTION:
        group, size = num_heads // num_kv_heads, SIZES[pages]
        layer = {"GROUP": group, "NUM_HEADS": num_heads, "HEAD_SIZE": head_size}
        constants = {**layer, "PAGE": page, "SOFT_CAP": cap}
        types = dict.fromkeys(("key_pages", "value_pages"), f"*{pages}")
        computed = pages if pages == "fp32" else "bf16"
        types |= dict.fromkeys(("queries", "output"), f"*{computed}")
        for rows in all_rows:
            tile = tile_entries(head_size, size)
            tiles = {"TILE": tile, "MAX_TOKENS": rows // 16, "MAX_REQS": 256}
            launches = decode_launches(rows, head_size, size, tile)
            yield _decode, types, {**constants, **tiles}, launches, capability
        prefill = {**constants, "TILE": tile_entries(head_size, max(2, size))}
        if capability == A100:  # beside xformers, whose results it is merged with
            yield _prefill, {**types, "output": "*fp32"}, prefill, LAUNCHES, capability
        elif pages == "fp32" and capability == L40:  # only the smallest launch fits it
            alone = {**prefill, "log_sums": None}
            yield _prefill, types, alone, LAUNCHES[-1:], capability
        else:
            yield _prefill, types, {**prefill, "log_sums": None}, LAUNCHES, capability
    merge = {"MAX_REQS": 256, "MAX_TOKENS": 1, "NUM_HEADS": 32, "HEAD_SIZE": 128, "MERGED": MERGED}
    yield _merge, {"output": "*bf16"}, merge, (), H200
    plan = {"MIN_TILES": MIN_TILES, "TILE": 64, "REQUESTS": 1024}
    yield _decode_plan, {}, plan, (), H200
    for given in ({"BOUNDED": True}, {"BOUNDED": False, "shifts": None, "span_left": None}):
        constants = {"PAGE": 16, "TILE": TOKENS, "SEGMENT": SEGMENT, **given}
        yield _kept_metadata, {}, constants, (), H200
    for neox in (False, True):
        layer = {"NUM_HEADS": 32, "HEAD_SIZE": 128, "HALF": 64, "NEOX": neox}
        yield _rotate_queries, {"query": "*bf16", "output": "*bf16"}, layer, (), H200
    for pages, half, limit in (("bf16", 0, 0.0), ("fp8e4nv", 64, 448.0)):
        types = {"key": "*bf16", "value": "*bf16"}
        types |= {"key_pages": f"*{pages}", "value_pages": f"*{pages}"}
        layer = {"NUM_HEADS": 8, "HEAD_SIZE": 128, "PAGE": 16, "HALF": half, "LIMIT": limit}
        yield _write_kv, types, {**layer, "NEOX": True}, (), H200


def training_cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Sequence[Launch], int]]:
    """The same of training's kernels: heads, type, GPU, whether sinks are apart."""
    for (num_heads, num_kv_heads, head_size), kind, capability, has_sinks in (
        ((32, 8, 128), "bf16", H200, True),
        ((12, 12, 64), "bf16", A100, False),
        ((12, 12, 64), "bf16", L40, False),
    ):
        types = dict.fromkeys(PACKED, f"*{kind}")
        group = num_heads // num_kv_heads
        constants = {"GROUP": group, "NUM_HEADS": num_heads, "HEAD_SIZE": head_size}
        if not has_sinks:
            constants |= {"sinks": None, "sink_ranges": None, "sink_seen": None}
        forward, gradients = packed.FORWARD, (packed.QUERY_GRADIENT, packed.KEY_GRADIENT)
        if head_size > 64:
            forward, gradients = packed.WIDE_FORWARD, (packed.WIDE_GRADIENT, packed.WIDE_GRADIENT)
        yield packed._packed_forward, types, constants, forward, capability
        yield packed._packed_query_gradient, types, constants, gradients[0], capability
        if has_sinks:  # the stream's pass, whose results the windows' adds
            constants |= {"IS_STREAM": True, "stream_entry": None}
            constants |= {"stream_key_grads": None, "stream_value_grads": None}
            types = {**types, "key_grads": "*fp32", "value_grads": "*fp32"}
        else:
            constants |= {"IS_STREAM": False}
        yield packed._packed_key_gradient, types, constants, gradients[1], capability
    # The largest heads and elements in the least memory, with the launch that has to fit.
    types = dict.fromkeys(PACKED, "*fp32")
    constants = {"GROUP": 4, "NUM_HEADS": 4, "HEAD_SIZE": 256, "IS_STREAM": False}
    kernels = packed._packed_forward, packed._packed_query_gradient, packed._packed_key_gradient
    for kernel in kernels:
        yield kernel, types, constants, packed.LAST[-1:], L40
    deltas = {"NUM_HEADS": 12, "HEAD_SIZE": 64, "ROWS": packed.DELTA_ROWS}
    yield packed._packed_deltas, dict.fromkeys(PACKED, "*bf16"), deltas, (), H200


def compile_first_that_fits(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    launches: Sequence[Launch],
    capability: int,
) -> dict[str, Any]:
    """Sizes of the first launch whose shared memory the GPU has, or of the last one."""
    if not launches:
        return {**compile_one(kernel, types, constants, {}, capability), "launch": 0}
    for index, launch in enumerate(launches):
        options = {"ROWS": launch.rows, **launch.options}
        chosen = {**constants, **{key: x for key, x in options.items() if key.isupper()}}
        options = {key: x for key, x in options.items() if key.islower()}
        found = compile_one(kernel, types, chosen, options, capability)
        found["launch"] = index
        if found["shared"] <= SHARED_MEMORY[capability]:
            break
    return found


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: Any, capability: int
) -> dict[str, Any]:
    """Sizes of the compiled kernel."""
    known = {**INDEX, **FLOATS, **types}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else known.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or (name.endswith("_stride") and "table" not in name))
        and not kernel.params[index].do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = show("cuobjdump", "-res-usage", file.name)
        code = show("nvdisasm", "-c", file.name)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "constants": constants,
        "pages": types.get("key_pages", ""),
        "specialized": [
            parameter.name
            for parameter in kernel.params
            if not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment
        ],
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),  # bytes per thread
        "shared": compiled.metadata.shared,  # bytes
        "warps": compiled.metadata.num_warps,
        "instructions": instructions_per_tile(code),
        "tiles": max((int(x) for x in TILES.findall(compiled.asm["ttgir"])), default=0),
    }


def show(tool: str, *arguments: str) -> str:
    """What a tool that comes with Triton prints."""
    command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_per_tile(code: str) -> int:
    """Instructions of the longest innermost loop, that over tiles, where all rows see the whole
    tile: branches inside of it, which lead around the comparison of positions, are taken. 0 without
    a loop."""
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    count = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*);", line):
            if branch := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1]):
                branches.append((count, branch[1]))
            count += 1
    jumps = [(at, labels[label]) for at, label in branches]
    loops = [(begin, end) for end, begin in jumps if begin < end]
    longest = 0
    for begin, end in loops:
        if not any(begin <= a and b < end for a, b in loops if (a, b) != (begin, end)):
            skipped = sum(to - at - 1 for at, to in jumps if begin <= at < to <= end)
            longest = max(longest, end - begin + 1 - skipped)
    return longest


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in (*cases(), *training_cases()):
        json.dump(compile_first_that_fits(*case), sys.stdout)
        print(flush=True)
