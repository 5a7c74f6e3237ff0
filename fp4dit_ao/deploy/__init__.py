"""Quantized transformers as one file that runs without the model's Python class."""
