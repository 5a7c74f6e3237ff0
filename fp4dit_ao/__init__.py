"""FP4DiT: floating-point post-training quantization of diffusion transformers, in PyTorch's export flow (PT2E)."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fp4dit_ao._registration import register

__version__ = "0.1.0"

_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").exists() and (_checkout / "passes").is_dir():
    # in a source checkout passes/ and observers/ stand beside this folder; an install puts them inside
    __path__.append(str(_checkout))

_HOME = {
    "FloatFormat": "formats",
    "QuantConfig": "config",
    "w4a6": "config",
    "w4a8": "config",
    "w4a6_auto": "config",
    "FP4DiTQuantizer": "quantizer",
    "AdaRoundConfig": "passes.reconstruct",
    "reconstruct": "passes.reconstruct",
    "lower": "passes.lower",
    "compile_blocks": "compilation",
    "capture": "capture",
    "quantizer_for": "families",
    "example_inputs": "families",
    "calibrate": "calibration",
    "collect_samples": "calibration",
    "quantize_pipeline": "pipeline",
    "load_pipeline": "pipeline",
    "MinifloatTensor": "tensor",
    "QuantizedTransformer": "quantized_transformer",
    "quantize_modules": "modules",
    "FP4DiTConfig": "diffusers_quantizer",
    "export_single_file": "single_file",
    "read_single_file": "single_file",
}
"""Where each public name lives; loaded on first use, so that importing the package stays quick."""

__all__ = [*_HOME]

if TYPE_CHECKING:
    from fp4dit_ao.calibration import calibrate, collect_samples
    from fp4dit_ao.capture import capture
    from fp4dit_ao.compilation import compile_blocks
    from fp4dit_ao.config import QuantConfig, w4a6, w4a6_auto, w4a8
    from fp4dit_ao.diffusers_quantizer import FP4DiTConfig
    from fp4dit_ao.families import example_inputs, quantizer_for
    from fp4dit_ao.formats import FloatFormat
    from fp4dit_ao.modules import quantize_modules
    from fp4dit_ao.passes.lower import lower
    from fp4dit_ao.passes.reconstruct import AdaRoundConfig, reconstruct
    from fp4dit_ao.pipeline import load_pipeline, quantize_pipeline
    from fp4dit_ao.quantized_transformer import QuantizedTransformer
    from fp4dit_ao.quantizer import FP4DiTQuantizer
    from fp4dit_ao.single_file import export_single_file, read_single_file
    from fp4dit_ao.tensor import MinifloatTensor


def __getattr__(name: str) -> object:
    if (
        name == "ModelMixin"
    ):  # saved pipelines name fp4dit_ao.QuantizedTransformer; diffusers looks for its base beside it
        return importlib.import_module("diffusers").ModelMixin
    if name not in _HOME:
        raise AttributeError(f"module 'fp4dit_ao' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fp4dit_ao.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # the import system binds a submodule to its name here; capture() shares that of its module, and comes first
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register()
