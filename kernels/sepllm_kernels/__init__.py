"""Attention operations of SepLLM. Depends on torch and triton only."""
