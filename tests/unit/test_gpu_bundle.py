"""Device code in a library: what a GPU needs stays, byte for byte, and nothing else moves."""

import pytest
from helpers import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture
def bundle(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_bundle

    return gpu_bundle


def entry(bundle, kind, capability, code):
    """One piece of code; headers in wheels have 64 bytes."""
    return bundle.ENTRY.pack(kind, 257, 64, len(code), capability).ljust(64, b"h") + code


def container(bundle, *entries):
    body = b"".join(entries)
    return bundle.CONTAINER.pack(0xBA55ED50, 1, bundle.CONTAINER.size, len(body)) + body


def test_only_code_of_one_gpu_is_left(bundle):
    cubin, ptx = bundle.CUBIN, bundle.PTX
    own = entry(bundle, cubin, 90, b"hopper " * 9)
    generation = entry(bundle, cubin, 80, b"ampere " * 9)
    newer = entry(bundle, cubin, 100, b"blackwell")
    old_ptx, new_ptx = entry(bundle, ptx, 75, b"ptx 7.5"), entry(bundle, ptx, 80, b"ptx 8.0")
    parts = [
        b"host code",
        container(bundle, generation, own, newer, new_ptx),
        b"padding " * 3,
        container(bundle, old_ptx, generation, new_ptx, newer),  # the driver compiles PTX
        container(bundle, generation, newer),  # not for this GPU
        b"the rest",
    ]
    library = bytearray(b"".join(parts))
    bundle.drop_other_gpus(library, 90)
    expected = [
        parts[0],
        container(bundle, own).ljust(len(parts[1]), b"\0"),
        parts[2],
        container(bundle, new_ptx).ljust(len(parts[3]), b"\0"),
        container(bundle, newer).ljust(len(parts[4]), b"\0"),
        parts[5],
    ]
    assert library == b"".join(expected)
    again = bytearray(library)
    bundle.drop_other_gpus(again, 90)
    assert again == library


def test_newest_machine_code_of_the_generation(bundle):
    codes = [bundle.DeviceCode(bundle.CUBIN, x, 0, 1) for x in (80, 86, 89, 90)]
    assert [c.capability for c in bundle.needed(codes, 89)] == [89]
    assert [c.capability for c in bundle.needed(codes, 87)] == [86]
    assert bundle.needed(codes, 75) == []


@pytest.mark.parametrize("damage", ["cut", "kind"])
def test_an_unknown_form_is_an_error(bundle, damage):
    library = bytearray(container(bundle, entry(bundle, bundle.CUBIN, 90, b"code")))
    if damage == "cut":
        del library[-2:]
    else:
        library[bundle.CONTAINER.size] = 7
    with pytest.raises(bundle.BundleError, match="device code at"):
        bundle.drop_other_gpus(library, 90)
