"""What the engine relies on in vLLM, compared with the source of every version in the table."""

import ast
import builtins
import copyreg
import dataclasses
import gc
import inspect
import io
import logging
import math
import os
import pathlib
import platform
import sys
import weakref
from types import ModuleType

import numpy as np
import packaging.version
import prometheus_client
import pytest
import torch
from contract import project
from contract.facts import describe_all, load, snapshot_versions
from contract.judge import breaches, changes
from contract.signatures import Call, override_misfit, parameters
from contract.signatures import misfit as call_misfit
from contract.source import Tree
from contract.usage import Usage

from vllm_sepllm.engine.compat import COMPATIBILITY

pytestmark = pytest.mark.engine

INSTALLED = project.installed_version()
AGAIN = "PYTHONPATH=tools .venv/bin/python -m contract --write"


def others(version):
    return {v: load(v) for v in snapshot_versions() if v != version}


@pytest.fixture(scope="module")
def needs():
    return project.usage().needs


@pytest.fixture(scope="module")
def installed_facts(needs):
    return describe_all(project.installed_tree(), needs)


def test_the_table_and_the_snapshots_have_the_same_versions():
    assert snapshot_versions() == [str(entry.version) for entry in COMPATIBILITY]


def test_the_installed_vllm_keeps_the_contract(needs, installed_facts):
    assert breaches(needs, installed_facts, others(INSTALLED)) == []


@pytest.mark.parametrize("version", snapshot_versions())
def test_every_version_of_the_table_keeps_the_contract(needs, version):
    assert breaches(needs, load(version), others(version)) == [], AGAIN


def test_the_installed_vllm_is_what_its_snapshot_says(needs, installed_facts):
    assert INSTALLED in snapshot_versions(), f"no snapshot of vLLM {INSTALLED}: {AGAIN}"
    assert load(INSTALLED).keys() == needs.keys(), AGAIN
    assert changes(load(INSTALLED), installed_facts) == [], AGAIN


@pytest.mark.parametrize("version", [v for v in snapshot_versions() if v != INSTALLED])
def test_a_released_vllm_is_what_its_snapshot_says(needs, version):
    """The wheel's source against the snapshot, which the tests above use with or without it."""
    try:
        tree = project.released_tree(version)
    except project.NoSourceError as error:
        pytest.skip(f"the snapshot of vLLM {version} is not compared with its source: {error}")
    assert changes(load(version), describe_all(tree, needs)) == [], AGAIN


# What attributes in the engine's code may belong to, if not to our own objects or vLLM's.
FOREIGN = (
    *(torch, torch.Tensor, torch.UntypedStorage, np, np.ndarray, np.typing, copyreg, platform),
    *(prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram),
    *(torch.nn, torch.nn.Module, inspect, inspect.Signature),
    *(
        builtins,
        dataclasses,
        gc,
        logging,
        weakref,
        math,
        os,
        sys,
        pathlib.Path,
        packaging.version.Version,
    ),
    *(str, bytes, list, dict, set, tuple, ModuleType, io.StringIO),
)
NAMED_TUPLE = {"_asdict"}


def test_every_attribute_of_the_engine_is_accounted_for():
    """Where no annotation says whose attribute it is, ``relied.py`` must."""
    from contract.relied import MEMBERS, SET_FROM_OUTSIDE

    usage = project.usage()
    foreign = {name for thing in FOREIGN for name in dir(thing)} | NAMED_TUPLE
    listed = {name for names in MEMBERS.values() for name in names}
    known = foreign | usage.own_names | listed | set(SET_FROM_OUTSIDE)
    unknown = {name: where for name, where in usage.untyped.items() if name not in known}
    assert not unknown, (
        f"attributes of unknown objects: {unknown}. Annotate them, or name their class in "
        "tools/contract/relied.py"
    )


def test_the_usage_is_found(needs):
    """A few of each kind, so that an empty list of needs cannot pass for a kept contract."""
    manager = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
    assert needs["vllm.config:VllmConfig.cache_config"].is_used
    assert needs["vllm.config.cache:CacheConfig.prefix_cache_retention_interval"].is_used
    assert needs[f"{manager}._partial_hit_reqs"].is_used
    assert needs[f"{manager}._apply_cow"].calls == {
        Call(4): needs[f"{manager}._apply_cow"].calls[Call(4)]
    }
    assert needs[f"{manager}.cache_blocks"].overrides
    assert needs["vllm.v1.core.sched.scheduler:Scheduler.__init__"].calls
    assert needs["vllm.v1.attention.backend:AttentionImpl"].implements
    assert needs["vllm.v1.kv_cache_interface:KVCacheTensor.size"].is_used
    [call] = needs["vllm.v1.kv_cache_spec_registry:register_kv_cache_spec"].calls
    assert call == Call(0, ("manager_class",))
    assert needs["vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.supported_dtypes"]
    [call] = needs["vllm.v1.core.block_pool:BlockPool._insert_block_hash"].calls
    assert call == Call(2, ("num_tokens",))
    assert needs["vllm.v1.worker.gpu_input_batch:InputBatch.req_ids"].is_used


ENGINE_MODULE = """
from typing import Any
from vllm.v1.request import Request

def f(request: Request, runner: Any, many: dict[str, Request]):
    local = request
    local.take_events(1)
    for name, other in many.items():
        other.trace_headers
    original = Request.take_prefill_stats
    original(request)
    return runner.input_batch.token_ids_cpu, request.priority
"""


def test_usage_is_inferred_from_annotations_and_the_rest_is_reported(tmp_path):
    engine = tmp_path / "vllm_sepllm" / "engine"
    engine.mkdir(parents=True)
    for folder in (engine.parent, engine):
        (folder / "__init__.py").touch()
    (engine / "module.py").write_text(ENGINE_MODULE)
    packages = {**project.installed_tree()._packages, "vllm_sepllm": engine.parent}
    usage = Usage(Tree(packages), engine)
    request = "vllm.v1.request:Request"
    assert {f"{request}.{name}" for name in ("take_events", "trace_headers", "priority")} <= set(
        usage.needs
    )
    assert list(usage.needs[f"{request}.take_events"].calls) == [Call(1)]
    assert list(usage.needs[f"{request}.take_prefill_stats"].calls) == [Call(0)]
    assert set(usage.untyped) - {"items"} == {"input_batch", "token_ids_cpu"}
    assert usage.untyped["token_ids_cpu"] == "vllm_sepllm.engine.module:12"


class Doctored(Tree):
    """The installed vLLM with one text replaced in one module."""

    def __init__(self, module, old, new):
        super().__init__(project.installed_tree()._packages)
        self._edit = (module, old, new)

    def text(self, module):
        text = super().text(module)
        edited, old, new = self._edit
        if module == edited:
            assert old in text, f"{module} has no {old!r}"
            text = text.replace(old, new, 1)
        return text


SINGLE = "vllm.v1.core.single_type_kv_cache_manager"
MANAGER = f"{SINGLE}:SingleTypeKVCacheManager"
POOL = "vllm.v1.core.block_pool"
SCHEDULER = "vllm.v1.core.sched.scheduler"
BACKEND = "vllm.v1.attention.backend"
FREE = "    def free(self, request_id"
FIND = "    @abstractmethod\n    def find_longest_cache_hit("
POP = "    def pop_blocks_for_free(self, "
SIZE = "        self.block_size = "
BLOCK = "        block: KVCacheBlock,\n        "
FAST = "        fast_build: bool = False,"
SELECTOR = "class AttentionSelectorConfig(NamedTuple):\n"
DOCTORED = {
    "name removed": (
        ("vllm.utils.math_utils", "def cdiv(", "def ceil_div("),
        "vllm.utils.math_utils:cdiv: does not exist",
    ),
    "method removed": (
        (SINGLE, "def _apply_cow(", "def _copy_on_write("),
        f"{MANAGER}._apply_cow: does not exist",
    ),
    "attribute renamed": (
        (SINGLE, "self._partial_hit_reqs: ", "self._partial_hits: "),
        f"{MANAGER}._partial_hit_reqs",
    ),
    "field of a configuration removed": (
        ("vllm.config.scheduler", "    scheduler_cls: ", "    scheduler: "),
        "vllm.config.scheduler:SchedulerConfig.scheduler_cls: does not exist",
    ),
    "parameter renamed under a call": (
        (POOL, f"{BLOCK}num_tokens: int | None,", f"{BLOCK}count: int | None,"),
        f"{POOL}:BlockPool._insert_block_hash: has no parameter 'num_tokens'",
    ),
    "parameter required by a call": (
        (POOL, "def touch(self, ", "def touch(self, now, "),
        f"{POOL}:BlockPool.touch: needs ",
    ),
    "parameter renamed under an override": (
        (SINGLE, f"{POP}request_id", f"{POP}rid"),
        f"{MANAGER}.pop_blocks_for_free: 'rid' is now where ours has 'request_id'",
    ),
    "parameter given to an override": (
        (BACKEND, FAST, f"{FAST} how: int = 0,"),
        f"{BACKEND}:AttentionMetadataBuilder.build: is called with 'how', which ours does not take",
    ),
    "overridden method removed": (
        (SCHEDULER, "def _update_request_as_session(", "def _extend_session("),
        f"{SCHEDULER}:Scheduler._update_request_as_session: is gone, vLLM",
    ),
    "name of ours taken": (
        (SINGLE, FREE, f"    def num_pages(self): ...\n\n{FREE}"),
        f"{MANAGER}.num_pages: is new: ours (",
    ),
    "attribute of ours taken": (
        (SINGLE, SIZE, f"        self._pending = None\n{SIZE}"),
        f"{MANAGER}._pending: is new: ours (",
    ),
    "abstract method added": (
        (SINGLE, FREE, f"    @abstractmethod\n    def defragment(self): ...\n\n{FREE}"),
        f"{MANAGER}: needs defragment (subclass at ",
    ),
    "class method made a method": (
        (SINGLE, f"    @classmethod\n{FIND}", FIND),
        f"{MANAGER}.find_longest_cache_hit: is a method, ours (",
    ),
    "plug-in group renamed": (
        ("vllm.plugins", '"vllm.platform_plugins"', '"vllm.platforms"'),
        "vllm.plugins:PLATFORM_PLUGINS_GROUP: is 'vllm.platforms', must be",
    ),
    "field passed on that is not taken": (
        ("vllm.v1.attention.selector", SELECTOR, f"{SELECTOR}    mood: int\n"),
        f"{BACKEND}:AttentionBackend.validate_configuration: has no parameter 'mood'",
    ),
    "field of an output renamed": (
        ("vllm.v1.engine", "    stop_reason: ", "    why: "),
        "vllm.v1.engine:EngineCoreOutput: has no parameter 'stop_reason'",
    ),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_vllm_that_moved_is_reported(needs, installed_facts, name):
    edit, expected = DOCTORED[name]
    tree = Doctored(*edit)
    module = expected.partition(":")[0]
    keys = {key for key in needs if key.startswith((edit[0] + ":", module + ":"))}
    facts = {**installed_facts, **describe_all(tree, keys)}
    found = breaches(needs, facts, {INSTALLED: installed_facts})
    assert any(text.startswith(expected) for text in found), found
    assert changes(installed_facts, facts)


def test_a_class_that_moved_elsewhere_is_still_found(needs, installed_facts, tmp_path):
    """Classes that only vLLM's own annotations name may move without harm."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "new_place.py").write_text("class InputBatch:\n    req_ids: list[str]\n")
    key = "vllm.v1.worker.gpu_input_batch:InputBatch.req_ids"
    fact = describe_all(Tree({"vllm": package}), [key])[key]
    assert fact["in"] == "vllm.new_place:InputBatch"
    [line] = changes({key: installed_facts[key]}, {key: fact})
    assert "moved from vllm.v1.worker.gpu_input_batch:InputBatch to vllm.new_place" in line


def signature(text):
    return parameters(ast.parse(f"def f({text}): ...").body[0], bound=False)


@pytest.mark.parametrize(
    ("call", "function", "reason"),
    [
        ("f(1, 2)", "a, b", None),
        ("f(1, b=2)", "a, b", None),
        ("f(1)", "a, b=0", None),
        ("f(*x)", "a, b", None),
        ("f(1, **x)", "a, b", None),
        ("f(1, c=3)", "a, **rest", None),
        ("f(1, 2, 3)", "a, *rest", None),
        ("f(1)", "a, b", "needs 'b'"),
        ("f(1, 2)", "a", "takes 1 positional arguments, 2 are given"),
        ("f(1, 2)", "a, *, b", "takes 1 positional arguments, 2 are given"),
        ("f(1, c=3)", "a", "has no parameter 'c'"),
        ("f(1, a=3)", "a", "is given 'a' twice"),
        ("f(1)", "a, *, b", "needs 'b'"),
        ("f(**x, c=3)", "a, b", "has no parameter 'c'"),
    ],
)
def test_calls(call, function, reason):
    shape = Call.of(ast.parse(call, mode="eval").body)
    assert call_misfit(shape, signature(function)) == reason


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("a, b", "a, b", None),
        ("a, *args, **kwargs", "a, b, *, c", None),
        ("a, b, own=0", "a, b", None),
        ("a", "a, b", "is called with 'b', which ours does not take"),
        ("a, *args", "a, b", "is called with 'b', which ours does not take"),
        ("a, c", "a, b", "'b' is now where ours has 'c'"),
        ("a, b", "a, b=0", "'b' may be left out, ours needs it"),
        ("a, b", "a", "no longer passes 'b', which ours needs"),
        ("a", "a, *, b", "is called with 'b', which ours does not take"),
        ("a, b", "a, *, b", None),
        ("a", "a, **rest", "takes **rest, ours does not"),
    ],
)
def test_overrides(ours, theirs, reason):
    assert override_misfit(signature(ours), signature(theirs)) == reason
