"""Quantized transformers in diffusers: pipelines, the graph form, the module form, LoRA."""
