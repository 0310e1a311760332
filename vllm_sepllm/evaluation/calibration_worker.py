"""A process that looks at attention: ``python -m vllm_sepllm.evaluation.calibration_worker JOB``.

It needs Transformers and no vLLM. :func:`calibrate` starts it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.calibration import keep_list, received_from_far
from vllm_sepllm.evaluation.child import EvaluationError, child
from vllm_sepllm.evaluation.ways import possible
from vllm_sepllm.evaluation.worker import run_job, write_json
from vllm_sepllm.kept_ids import resolve_kept

SHARES = 0.05, 0.1, 0.2
LENGTH, MOST_TEXTS = 1024, 16
NUM_SINKS, WINDOW = 4, 256
CLASSES = "separators", "special", "digits", "names", "capitalized"


def calibrate(
    model: str, tokenizer: Any, texts: Sequence[str], dtype: str, folder: Path
) -> list[tuple[float, list[str | int]]]:
    """Lists for ``keep``, each behind the share of tokens that it makes up, found in a process of
    its own.

    Args:
        model: folder or name.
        tokenizer: its own.
        texts: to look at.
        dtype: as of vLLM.
        folder: for the job, its log and its result.

    Raises:
        EvaluationError: the process failed.
        ValueError: the texts are too short.
    """
    bos = [] if tokenizer.bos_token_id is None else tokenizer.encode("")[:1]
    pieces, count = [], 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        count += len(ids)
        size = LENGTH - len(bos)
        pieces += [bos + ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    if not pieces:
        raise ValueError(
            f"calibration has {count:,} tokens of text: give at least {3 * LENGTH:,}, of which "
            "it takes a third"
        )
    options = {name: SepLLMConfig(keep=(name,)) for name in CLASSES}
    usable = possible({name: {"keep": [name]} for name in CLASSES}, tokenizer)[0]
    classes = {name: resolve_kept(options[name], tokenizer).token_ids for name in usable}
    result = folder / "calibration.json"
    job = {
        "model": model,
        "dtype": dtype,
        "texts": pieces[:: -(-len(pieces) // MOST_TEXTS)],
        "classes": classes,
        "result": str(result.resolve()),
    }
    file = folder / "calibration.job"
    write_json(file, job)
    with child(
        "vllm_sepllm.evaluation.calibration_worker", file, folder / "calibration.log"
    ) as one:
        failure = one.failure()
    if failure is not None:
        raise EvaluationError(f"calibration ended: {failure}")
    found = json.loads(result.read_text(encoding="utf8"))
    return [(share, keep) for share, keep in found if keep]


def run(job: dict[str, Any]) -> list[tuple[float, list[str | int]]]:
    """Lists for ``keep``, each behind its share."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=job["dtype"], trust_remote_code=False
    )
    model = model.to(device).eval()
    size = 1 + max(i for text in job["texts"] for i in text)
    found = received_from_far(model, job["texts"], size, NUM_SINKS, WINDOW)
    return [keep_list(found, job["classes"], share) for share in SHARES]


if __name__ == "__main__":
    run_job(run)
