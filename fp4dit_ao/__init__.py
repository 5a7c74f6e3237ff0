"""FP4DiT: floating-point post-training quantization of diffusion transformers, in PyTorch's export flow (PT2E)."""

__version__ = "0.1.0"
