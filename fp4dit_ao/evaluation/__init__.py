"""Evaluation of quantized pipelines: image metrics, tables and pictures."""
