"""Everything that touches vLLM. Nothing outside this package imports it."""
