"""Settings: formats of linears (:class:`QuantConfig`, recipes), and rounding of weights (:class:`ReconstructionConfig`)."""

from fp4dit_ao.config.plans import PLANS, Plan, best
from fp4dit_ao.config.quant_config import HIGH_PRECISION, RECIPES, Fields, QuantConfig
from fp4dit_ao.config.recipes import (
    DEFAULT_RECIPE,
    int_w4a4,
    int_w4a6,
    int_w4a8,
    mxfp4,
    nvfp4,
    w4a4,
    w4a4_codebook,
    w4a4_twin_log,
    w4a6,
    w4a6_auto,
    w4a6_codebook,
    w4a6_lowbit_fp,
    w4a8,
    w4a8_codebook,
    w4a8_lowbit_fp,
    w8a8,
)
from fp4dit_ao.config.reconstruction_config import AdaRoundConfig, ReconstructionConfig

__all__ = [
    "DEFAULT_RECIPE", "HIGH_PRECISION", "PLANS", "RECIPES", "AdaRoundConfig", "Fields", "Plan", "QuantConfig",
    "ReconstructionConfig", "best", "int_w4a4", "int_w4a6", "int_w4a8", "mxfp4", "nvfp4", "w4a4", "w4a4_codebook",
    "w4a4_twin_log", "w4a6", "w4a6_auto", "w4a6_codebook", "w4a6_lowbit_fp", "w4a8", "w4a8_codebook", "w4a8_lowbit_fp",
    "w8a8",
]  # fmt: skip
