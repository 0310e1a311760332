"""SepLLM attention for vLLM: sinks, separators and a recent window stay, the rest is freed.

Reading order: ``policy.py`` (what is attended), ``oracle/dense_mask.py`` (the same as a dense
mask), ``engine/README.md`` (a step of the engine, from token ids to attention).
"""

__version__ = "0.1.0"
