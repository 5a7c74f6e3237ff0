"""Speed and exactness on one NVIDIA GPU, beside other kernels: ``python -m benchmarks.gpu``.

Parts (``--part tests,linears``), each within its own ``--minutes``, most telling rows first, printed and written to
``gpu.json`` as they are measured:

- ``tests``: the tests that a GPU enables
- ``decode``: codebook groups to bytes, exactness and speed
- ``linears``: products of quantized tokens, and whole linears, beside cuBLAS, cuBLASLt and torchao
- ``step``: a denoising step of PixArt-XL at 1024 px and of FLUX.1 at its width, compiled by block
- ``attention``: PyTorch's backends, and attention on quantized q, k and v
- ``reconstruction``: nearest rounding of a PixArt-XL-shaped model, and learned rounding of a block

It needs torch 2.11 or newer with CUDA and Triton, torchao and diffusers, and runs from a plain tree. ``tests`` also needs
pytest, hypothesis and what else the extra ``dev`` names. On machines without internet access, unpack wheels onto PYTHONPATH.
"""

from benchmarks.gpu.command import main

__all__ = ["main"]
