"""Tensor subclasses for low-bit weights, one a file."""
