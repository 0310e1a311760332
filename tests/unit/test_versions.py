"""Versions of vLLM are said in ``engine/compat.py``; what cannot import it says the same."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def releases():
    """Releases that tests ran with, and all that are known of, oldest first."""
    pytest.importorskip("packaging", reason="needs packaging, which vLLM brings")
    from vllm_sepllm.engine.compat import COMPATIBILITY

    return [e.version for e in COMPATIBILITY if e.evidence == "run"], [
        e.version for e in COMPATIBILITY
    ]


def test_scripts_install_what_tests_ran_with(releases):
    newest = str(releases[0][-1])
    for path in ("scripts/setup.sh", "scripts/gpu_bundle.py"):
        [found] = re.findall(r'^VLLM ?= ?"?([\d.]+)"?$', (ROOT / path).read_text(), re.MULTILINE)
        assert found == newest, path
    name = tomllib.loads((ROOT / "scripts/vllm-name/pyproject.toml").read_text())
    assert name["project"]["version"] == f"{newest}+cpu"


def test_extras_allow_what_is_known(releases):
    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in ("cpu", "cuda"):
        [allowed] = [Requirement(text).specifier for text in extras[extra]]
        assert all(version in allowed for version in releases[1])
        after = f"{releases[1][-1].major}.{releases[1][-1].minor + 1}"
        assert after not in allowed, "a release that nobody has looked at"


def test_documents_name_them(releases):
    readme = " ".join((ROOT / "README.md").read_text().split())  # wherever its lines break
    assert f"installs vLLM {releases[0][-1]} into `.venv`" in readme
    table = (ROOT / "docs/works-with.md").read_text()
    for version in releases[1]:
        assert f"| {version} |" in table


@pytest.mark.parametrize("has_groups", [False, True], ids=["0.32", "0.33"])
def test_plans_of_the_kv_cache_in_both_shapes(monkeypatch, has_groups):
    import sys
    from types import ModuleType

    from vllm_sepllm.engine import compat

    core = ModuleType("vllm.v1.engine.core")
    core.get_kv_cache_configs = lambda *given: ["planned", *given]
    if has_groups:
        core.get_global_kv_cache_groups = lambda config, specs: ("groups", config, specs)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", core)
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    more = [("groups", "config", ["specs"])] if has_groups else []
    assert compat.kv_cache_configs("config", ["specs"], [5]) == [
        *("planned", "config", ["specs"], [5]),
        *more,
    ]
