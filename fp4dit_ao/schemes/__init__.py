"""Quantization schemes: each owns its observer, tensor class and stored parts."""
