"""Attention of the tokens of prompts over pages; imported where there is Triton."""
