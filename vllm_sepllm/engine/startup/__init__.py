"""What is decided once, when an engine starts."""
