"""Named recipes."""

from dataclasses import replace
from typing import Literal

from fp4dit_ao.config.quant_config import RECIPES, QuantConfig
from fp4dit_ao.formats.twin_log import TWIN_LOGS
from fp4dit_ao.ops.block_scale import BLOCKS

DEFAULT_RECIPE = "w4a6_codebook"
"""Recipe where none is named: closest to full precision on the reference pipeline, and one int8 product for every linear."""


def w4a6() -> QuantConfig:
    """FP4DiT W4A6: E2M1 weights, E3M0 before GELU, groups of 128; token-wise online E2M3 activations, q, k and v."""
    return QuantConfig()


def w4a8() -> QuantConfig:
    """FP4DiT W4A8: as :func:`w4a6` with E3M4 activations."""
    return QuantConfig(activation="e3m4", attention="e3m4")


def w4a6_auto() -> QuantConfig:
    """As :func:`w4a6`, but each linear takes whichever 4-bit format errs least at its output on calibration data, with scales
    searched for the least squared error."""
    return QuantConfig(weight_candidates=("e1m2", "e2m1", "e3m0", "nf4"), pre_gelu_weight=None, weight_search="mse")


def int_w4a6() -> QuantConfig:
    """The naive integer baseline: symmetric INT4 weights (groups of 128), token-wise INT6 activations, q, k and v."""
    return QuantConfig(weight="int4", activation="int6", pre_gelu_weight=None, attention="int6")


def int_w4a8() -> QuantConfig:
    """As :func:`int_w4a6` with INT8 activations."""
    return QuantConfig(weight="int4", activation="int8", pre_gelu_weight=None, attention="int8")


def nvfp4() -> QuantConfig:
    """NVIDIA's NVFP4 for weights and inputs: E2M1, an E4M3 scale for 16 elements, a float32 one for the tensor."""
    return _blocks("e2m1", "e4m3")


def mxfp4() -> QuantConfig:
    """OCP MXFP4 for weights and inputs: E2M1, a power-of-two scale for 32 elements."""
    return _blocks("e2m1", "e8m0")


def w4a6_codebook() -> QuantConfig:
    """Codebook groups for weights (4.03 bits and a float for each row), token-wise E2M3 for inputs, q, k and v."""
    return QuantConfig(weight="nf4_groups", pre_gelu_weight=None, weight_search="mse")


def w4a8_codebook() -> QuantConfig:
    """As :func:`w4a6_codebook` with INT8 inputs, q, k and v."""
    return replace(w4a6_codebook(), activation="int8", attention="int8")


def w4a4() -> QuantConfig:
    """E2M1 for weights (groups of 128) and for inputs, token-wise and online; q, k and v stay as they are."""
    return QuantConfig(activation="e2m1", pre_gelu_weight=None, attention=None)


def w4a4_codebook() -> QuantConfig:
    """As :func:`w4a6_codebook` with E2M1 inputs; q, k and v stay as they are."""
    return replace(w4a6_codebook(), activation="e2m1", attention=None)


def int_w4a4() -> QuantConfig:
    """The integer baseline of :func:`w4a4`: symmetric INT4 for both."""
    return QuantConfig(weight="int4", activation="int4", pre_gelu_weight=None, attention=None)


def w4a4_twin_log() -> QuantConfig:
    """LRQ-DiT's twin log weights: each linear takes the eta that errs least at its output, with scales searched for the least
    squared error; token-wise INT4 inputs. With the transform ``adaptive_rotation``, the whole method."""
    return QuantConfig(
        weight_candidates=tuple(TWIN_LOGS), activation="int4", pre_gelu_weight=None, attention=None, weight_search="mse"
    )


def w4a6_lowbit_fp() -> QuantConfig:
    """LowBit-FP (arXiv 2408.06995) with 6-bit inputs: a format and a range, of 111, for each tensor, static for inputs."""
    return QuantConfig(
        weight_candidates=("e1m2", "e2m1"), pre_gelu_weight=None, attention=None, weight_granularity="tensor",
        weight_search="lowbit_fp", activation_granularity="tensor", activation_search="lowbit_fp",
        activation_candidates=("e2m3", "e3m2"),
    )  # fmt: skip


def w4a8_lowbit_fp() -> QuantConfig:
    """As :func:`w4a6_lowbit_fp` with 8-bit inputs, the paper's FP4/FP8."""
    return replace(w4a6_lowbit_fp(), activation="e3m4", activation_candidates=("e2m5", "e3m4", "e4m3", "e5m2"))


def w8a8() -> QuantConfig:
    """INT8 for weights (a scale for each row), for inputs and for q, k and v: where 4 bits are too few."""
    return replace(int_w4a8(), weight="int8", weight_granularity="channel")


def _blocks(fmt: str, scale: Literal["e8m0", "e4m3"]) -> QuantConfig:
    return QuantConfig(
        weight=fmt, activation=fmt, group_size=BLOCKS[scale], pre_gelu_weight=None, attention=None,
        activation_granularity="block", scale_dtype=scale,
    )  # fmt: skip


RECIPES |= {
    "w4a6": w4a6,
    "w4a8": w4a8,
    "w4a6_auto": w4a6_auto,
    "w4a6_e2m1": lambda: replace(w4a6(), pre_gelu_weight=None),
    "w4a6_e1m2": lambda: replace(w4a6(), weight="e1m2"),
    "w4a6_nf4": lambda: replace(w4a6(), weight="nf4", pre_gelu_weight=None, weight_search="mse"),
    "w4a6_static": lambda: replace(w4a6(), activation_granularity="tensor"),
    "w4a6_mse": lambda: replace(w4a6(), weight_search="mse"),
    "w4a8_int8": lambda: replace(w4a8(), activation="int8", attention="int8"),
    "w4a8_e4m3": lambda: replace(w4a8(), activation="e4m3fn", attention="e4m3fn"),
    "w4a6_codebook": w4a6_codebook,
    "w4a8_codebook": w4a8_codebook,
    "w4a4": w4a4,
    "w4a4_twin_log": w4a4_twin_log,
    "w4a6_lowbit_fp": w4a6_lowbit_fp,
    "w4a8_lowbit_fp": w4a8_lowbit_fp,
    "w4a4_codebook": w4a4_codebook,
    "int_w4a4": int_w4a4,
    "int_w4a6": int_w4a6,
    "int_w4a8": int_w4a8,
    "w8a8": w8a8,
    "nvfp4": nvfp4,
    "nvfp4_four_over_six": lambda: replace(nvfp4(), weight_search="four_over_six"),
    "nvfp4_four_over_six_both": lambda: replace(
        nvfp4(), weight_search="four_over_six", activation_search="four_over_six"
    ),
    "mxfp4": mxfp4,
    "mxfp6_e2m3": lambda: _blocks("e2m3", "e8m0"),
    "mxfp6_e3m2": lambda: _blocks("e3m2", "e8m0"),
}
