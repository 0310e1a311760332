"""What ``vllm_sepllm/engine/`` relies on in vLLM, compared with vLLM's source.

Nothing here imports vLLM or the engine: both are parsed. ``usage`` finds what the engine relies
on, ``facts`` says what a version of vLLM offers for it, ``judge`` compares the two. Facts of the
versions in ``snapshots/`` are committed, so every version is checked on every run; whether they
are true is checked against the source itself where that is at hand::

    PYTHONPATH=tools .venv/bin/python -m contract             what moved between the versions
    PYTHONPATH=tools .venv/bin/python -m contract 0.34.0      the same with one more version
    PYTHONPATH=tools .venv/bin/python -m contract --write     take the snapshots again
"""
