"""Attention over the kept stream and the window, where keys and values lie side by side: chunks of
prompts on a CPU (``prefill``), and whole texts in training (``packed``)."""
