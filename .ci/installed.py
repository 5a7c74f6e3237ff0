"""Check of an installed wheel: run it outside of the checkout, after ``pip install`` of the wheel."""

import sys
from importlib import metadata, resources
from pathlib import Path

import torch

import fp4dit_ao
from fp4dit_ao.kernels.cpu import native

home = Path(fp4dit_ao.__file__).parent
assert home.is_relative_to(sys.prefix), f"{home} is not what was installed into {sys.prefix}"
assert metadata.version("fp4dit-ao") == fp4dit_ao.__version__
for name in fp4dit_ao.__all__:
    getattr(fp4dit_ao, name)
assert list((home / "kernels" / "cpu").glob("_native*")) and native.kernels(), "the C library was not built"
assert (resources.files("fp4dit_ao.reference") / "model_index.json").is_file()

weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
scale = torch.ops.fp4dit_ao.choose_scale(weight, [1, 128], "e2m1", torch.float32)
codes = torch.ops.fp4dit_ao.quantize(weight, [1, 128], scale, "e2m1")
again = torch.ops.fp4dit_ao.dequantize(codes, [1, 128], scale, "e2m1", torch.float32)
assert (weight - again).norm() < 0.12 * weight.norm()
print(f"fp4dit-ao {fp4dit_ao.__version__} in {home}, kernels: {', '.join(native.kernels())}")
