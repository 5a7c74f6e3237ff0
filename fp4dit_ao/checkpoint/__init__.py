"""Quantized transformers on disk."""
