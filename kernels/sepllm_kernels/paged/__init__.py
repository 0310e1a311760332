"""Attention over pages: the plan of a decode step, decode, and prompts."""
