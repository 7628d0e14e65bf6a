"""Codes as records of tokens, for transformers that are trained elsewhere."""
