"""Helpers that have nothing to do with quantization: files, tables, registries."""
