"""SepLLM attention for vLLM: sinks, separators and a recent window stay, the rest is freed.

Reading order: ``policy.py`` (what is attended), ``reference.py`` (the same as a dense mask),
``engine/manager.py`` (which pages a request holds), ``engine/backend.py`` (how they are read).
"""

__version__ = "0.1.0"
