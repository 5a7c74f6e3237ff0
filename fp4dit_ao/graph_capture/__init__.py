"""Capture of a model as one aten graph. Imports nothing, so that exported files load without torchao and diffusers."""
