"""Pack vLLM for a GPU machine that has torch, Triton and transformers but no network.

    python scripts/gpu_bundle.py [--output build/gpu-bundle.tar.xz]

Everything `from vllm import LLM` imports and such a machine lacks goes into one archive: vLLM's
Python code, its compiled kernels (dense FlashAttention-3 among them), a few packages, and the entry
points of this plugin, whose code comes from the checkout. vLLM's kernels use torch's stable ABI, so
an older torch than vLLM asks for loads them. Device code of other GPUs is left out. There:

    mkdir -p site && tar -xJf gpu-bundle.tar.xz -C site
    PYTHONPATH=kernels:.:site python3 ...      (scripts/gpu_e2e.sh does both)
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_source import CACHE, SUFFIXES, DownloadError, download

ROOT = Path(__file__).resolve().parent.parent
VLLM = "0.32.0"
KERNELS = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
# What `from vllm import LLM` imports beyond vLLM, torch, Triton, transformers and what those need.
# Where vLLM's own bound is narrower than "the newest", it is repeated.
PACKAGES = (
    "apache-tvm-ffi==0.1.11",
    "cachetools",
    "cbor2",
    "compressed-tensors",
    "fastapi<0.137",
    "httpx2",
    "llguidance<1.8",
    "loguru",
    "msgspec",
    "openai",
    "opentelemetry-api",
    "oss-harmony",
    "partial-json-parser",
    "pybase64",
    "pyzmq",
    "sniffio",
    "starlette",
    "xgrammar==0.2.8",
)
PACKAGES_AND_THEIR_NEEDS = ("pydantic",)  # it works with one version of its core alone
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PTX, CUBIN = 1, 2
CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes after it
ENTRY = struct.Struct("<HHIQ12xI")  # kind, -, bytes of this header, bytes after it, capability
MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, CONTAINER.size)


class BundleError(RuntimeError):
    """The archive cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class DeviceCode:
    """One piece of code for a GPU in a library, from ``start`` to ``stop``, bytes."""

    kind: int  # PTX or CUBIN
    capability: int  # 90 for 9.0
    start: int
    stop: int


@dataclass(frozen=True)
class Container:
    """Code of one translation unit for several GPUs: what CUDA calls a fatbin."""

    start: int
    stop: int
    codes: list[DeviceCode]


def containers(library: bytes | bytearray) -> Iterator[Container]:
    """All device code in a library."""
    at = library.find(MAGIC)
    while at != -1:
        *_, size = CONTAINER.unpack_from(library, at)
        entry, stop, codes = at + CONTAINER.size, at + CONTAINER.size + size, []
        if stop > len(library):
            raise BundleError(f"device code at {at} ends at {stop}, after the library's end")
        while entry < stop:
            kind, _, header, nbytes, capability = ENTRY.unpack_from(library, entry)
            end = entry + header + nbytes
            if kind not in (PTX, CUBIN) or header < ENTRY.size or end > stop:
                raise BundleError(f"device code at {entry} has a form this script does not know")
            codes.append(DeviceCode(kind, capability, entry, end))
            entry = end
        yield Container(at, stop, codes)
        at = library.find(MAGIC, stop)


def needed(codes: list[DeviceCode], capability: int) -> list[DeviceCode]:
    """What the driver would load on a GPU: machine code of its generation, else the newest PTX."""
    older = [code for code in codes if code.capability <= capability]
    machine = [c for c in older if c.kind == CUBIN and c.capability // 10 == capability // 10]
    candidates = machine or [c for c in older if c.kind == PTX]
    newest = max((code.capability for code in candidates), default=0)
    return [code for code in candidates if code.capability == newest]


def drop_other_gpus(library: bytearray, capability: int) -> None:
    """Leave in each container what a GPU loads, and zeros behind it; containers stay in place.

    One that holds nothing for this GPU keeps its smallest code, so that it is no empty container.
    """
    for container in list(containers(library)):
        magic, version, header, _ = CONTAINER.unpack_from(library, container.start)
        smallest = min(container.codes, key=lambda code: code.stop - code.start)
        codes = needed(container.codes, capability) or [smallest]
        stay = b"".join(library[code.start : code.stop] for code in codes)
        packed = CONTAINER.pack(magic, version, header, len(stay)) + stay
        nbytes = container.stop - container.start
        library[container.start : container.stop] = packed.ljust(nbytes, b"\0")


def wheel(version: str) -> Path:
    """The wheel of vLLM for CUDA, downloaded once."""
    folder = CACHE / f"vllm-{version}-wheel"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")  # what an interrupted run leaves
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        download(version, partial)
        partial.replace(folder)
    return next(folder.glob("*.whl"))


def add_vllm(site: Path, archive: zipfile.ZipFile, capability: int) -> None:
    """vLLM's code and kernels."""
    archive.extractall(site, [n for n in archive.namelist() if is_code(n)])
    for name in KERNELS:
        library = bytearray(archive.read(name))
        drop_other_gpus(library, capability)
        (site / name).write_bytes(library)


def is_code(name: str) -> bool:
    """Python code of a wheel, data that it reads, and the wheel's metadata."""
    suffix = Path(name).suffix
    return suffix in SUFFIXES if suffix else ".dist-info/" in name


def pip_install(site: Path, *what: str) -> None:
    """Install into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*pip, "--no-compile", "--target", str(site), *what],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise BundleError(f"pip could not install {what[-1]}: {'; '.join(errors) or done.stderr}")


def add_packages(site: Path, python: str) -> None:
    """What vLLM needs besides, built for the GPU machine's Python."""
    target = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    target += [f"--platform={name}" for name in PLATFORMS]
    pip_install(site, *target, *PACKAGES_AND_THEIR_NEEDS)
    pip_install(site, *target, "--no-deps", *PACKAGES)


def add_entry_points(site: Path) -> None:
    """Only the metadata of this plugin: the code that runs is the checkout's."""
    with tempfile.TemporaryDirectory() as scratch:
        pip_install(Path(scratch), "--no-deps", str(ROOT))
        [info] = Path(scratch).glob("vllm_sepllm-*.dist-info")
        shutil.copytree(info, site / info.name)


def pack(site: Path, output: Path) -> None:
    """One archive, compressed as far as it goes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    with lzma.open(partial, "wb", preset=9) as file, tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(site, arcname=".", filter=lambda info: None if is_waste(info.name) else info)
    partial.replace(output)


def is_waste(name: str) -> bool:
    """Neither imported nor read."""
    return "__pycache__" in name or name.endswith(".pyc") or name.startswith("./bin/")


def make_bundle(output: Path, python: str, capability: int) -> None:
    """The whole archive.

    Raises:
        BundleError: something cannot be fetched, or the wheel is not what this script knows.
    """
    try:
        path = wheel(VLLM)
    except DownloadError as error:
        raise BundleError(str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        with zipfile.ZipFile(path) as archive:
            add_vllm(site, archive, capability)
        add_packages(site, python)
        add_entry_points(site)
        pack(site, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu-bundle.tar.xz")
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU; 90 is 9.0")
    args = parser.parse_args()
    try:
        make_bundle(args.output, args.python, args.capability)
    except BundleError as error:
        raise SystemExit(f"gpu_bundle: {error}") from None
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
