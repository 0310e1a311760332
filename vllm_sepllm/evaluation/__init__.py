"""What SepLLM costs on a model and its texts."""
