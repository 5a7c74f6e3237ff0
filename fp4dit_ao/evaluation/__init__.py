"""Fidelity of quantized pipelines: metrics, tables, pictures."""
