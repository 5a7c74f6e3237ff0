"""FP4DiT: floating-point post-training quantization of diffusion transformers, in PyTorch's export flow (PT2E)."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fp4dit_ao._registration import OPERATORS, register

__version__ = "0.1.0"

_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").exists() and (_checkout / "passes").is_dir():
    # in a source checkout passes/ and observers/ stand beside this folder; an install puts them inside
    __path__.append(str(_checkout))

_HOME = {
    "FloatFormat": "formats",
    "QuantConfig": "config",
    "AdaRoundConfig": "config",
    "ReconstructionConfig": "config",
    "w4a6": "config",
    "w4a8": "config",
    "w4a6_auto": "config",
    "w4a6_codebook": "config",
    "w4a8_codebook": "config",
    "FP4DiTQuantizer": "quantizer",
    "reconstruct": "passes.reconstruction",
    "lower": "passes.lowering",
    "compile_blocks": "passes.compilation",
    "unpack_weights": "passes.weight_unpacking",
    "capture": "graph_capture.capturing",
    "transform": "graph_capture.transforming",
    "quantizer_for": "families",
    "example_inputs": "families",
    "calibrate": "calibration",
    "collect_samples": "calibration",
    "quantize_pipeline": "diffusers_integration.pipeline_quantization",
    "load_pipeline": "diffusers_integration.pipeline_folder",
    "MinifloatTensor": "tensors.minifloat",
    "CodebookTensor": "tensors.codebook",
    "QuantizedTransformer": "diffusers_integration.graph_form",
    "quantize_modules": "diffusers_integration.module_conversion",
    "FP4DiTConfig": "diffusers_integration.hf_quantizer",
    "export_single_file": "checkpoint.single_file",
    "methods": "plugin_points",
    "read_single_file": "checkpoint.single_file",
}
"""Module of each public name, imported on first use, so that importing the package stays quick."""

_MODULES = {"export": "deploy.exported_transformer"}
"""Public names of modules, imported on first use likewise."""

__all__ = [*_HOME, *_MODULES]

if TYPE_CHECKING:
    from fp4dit_ao.calibration import calibrate, collect_samples
    from fp4dit_ao.checkpoint.single_file import export_single_file, read_single_file
    from fp4dit_ao.config import (
        AdaRoundConfig,
        QuantConfig,
        ReconstructionConfig,
        w4a6,
        w4a6_auto,
        w4a6_codebook,
        w4a8,
        w4a8_codebook,
    )
    from fp4dit_ao.deploy import exported_transformer as export
    from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
    from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTConfig
    from fp4dit_ao.diffusers_integration.module_conversion import quantize_modules
    from fp4dit_ao.diffusers_integration.pipeline_folder import load_pipeline
    from fp4dit_ao.diffusers_integration.pipeline_quantization import quantize_pipeline
    from fp4dit_ao.families import example_inputs, quantizer_for
    from fp4dit_ao.formats import FloatFormat
    from fp4dit_ao.graph_capture.capturing import capture
    from fp4dit_ao.graph_capture.transforming import transform
    from fp4dit_ao.passes.compilation import compile_blocks
    from fp4dit_ao.passes.lowering import lower
    from fp4dit_ao.passes.reconstruction import reconstruct
    from fp4dit_ao.passes.weight_unpacking import unpack_weights
    from fp4dit_ao.plugin_points import methods
    from fp4dit_ao.quantizer import FP4DiTQuantizer
    from fp4dit_ao.tensors.codebook import CodebookTensor
    from fp4dit_ao.tensors.minifloat import MinifloatTensor


def __getattr__(name: str) -> object:
    if name == "ModelMixin":  # diffusers looks beside fp4dit_ao.QuantizedTransformer for its base class
        return importlib.import_module("diffusers").ModelMixin
    value: object
    if name in _MODULES:
        value = importlib.import_module(f"fp4dit_ao.{_MODULES[name]}")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"fp4dit_ao.{_HOME[name]}"), name)
        importlib.import_module(OPERATORS)  # public, too, as torch.ops.fp4dit_ao
    else:
        raise AttributeError(f"module 'fp4dit_ao' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


register()
