"""Why a linear is not faster than bfloat16 on a machine, in plain words."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import codebook_linear
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import digits
from fp4dit_ao.kernels.units import Unit
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight

FEW_TOKENS = 64
"""Tokens up to which a linear is bound by its call and its weight rather than by its products."""
SHORT_SECONDS = 2e-4
"""Time of a linear in bfloat16 up to which a call and the quantization of tokens are a large part of ours."""
_DOT_PRODUCTS = ("amx", "avx512vnni", "avxvnni", "dotprod")
"""Instruction sets that multiply bytes and add the products in one instruction."""


class SlowLinear(NamedTuple):
    """Facts of a layer that a reason depends on.

    Attributes:
        weight: the low-bit weight.
        unit: what computes it.
        device: where.
        rows: tokens of a call.
        speed: as measured.
    """

    weight: LowBitWeight
    unit: Unit[object]
    device: torch.device
    rows: int
    speed: LayerSpeed


def reason(weight: LowBitWeight, device: torch.device, rows: int, speed: LayerSpeed) -> str:
    """Why a linear is not faster than bfloat16; empty if it is."""
    if not speed.steady:
        return "not known: other work disturbed the measuring"
    if speed.speed > 1:
        return ""
    linear = SlowLinear(weight, weight.unit(device), device, rows, speed)
    return next(text(linear) for holds, text in _REASONS if holds(linear))


def _on_cpu_without_library(o: SlowLinear) -> bool:
    return o.device.type == "cpu" and not native.is_built()


def _on_cpu_without_dot_products(o: SlowLinear) -> bool:
    return o.device.type == "cpu" and next(iter(codebook_linear.kernels()), "") not in _DOT_PRODUCTS


def _token_digits(o: SlowLinear) -> int:
    fmt = getattr(o.weight, "act_fmt", None)
    return 1 if fmt is None else digits(parse(fmt))


def _has_group_scales(o: SlowLinear) -> bool:
    scale = getattr(o.weight, "scale", None)
    return scale is not None and scale.ndim == 2 and scale.shape[1] > 1


_REASONS: list[tuple[Callable[[SlowLinear], bool], Callable[[SlowLinear], str]]] = [
    (
        lambda o: not o.unit.low_bit,
        lambda o: f"no unit for these formats on this {_processor(o)}: weights are made floats in every call",
    ),
    (_on_cpu_without_library, lambda o: "no compiled kernel: the package was installed without a C compiler"),
    (_on_cpu_without_dot_products, lambda o: "this processor has no dot products of bytes (VNNI, AMX, Arm's)"),
    (
        lambda o: o.rows <= FEW_TOKENS,
        lambda o: f"few tokens ({o.rows}): the call and reading the weight take the time, not the products",
    ),
    (
        lambda o: o.speed.bfloat16 <= SHORT_SECONDS,
        lambda o: (
            f"small layer: bfloat16 takes {o.speed.bfloat16 * 1e6:.0f} µs, the call and quantizing tokens as long"
        ),
    ),
    (
        lambda o: _token_digits(o) > 1,
        lambda o: f"a level of {o.weight.act_fmt} is {_token_digits(o)} int8 digits, and each is a product",
    ),
    (
        _has_group_scales,
        lambda o: (
            "a float scale for each group costs a conversion inside of the product; codebook groups (w4a6_codebook) do not"
        ),
    ),
    (lambda o: True, lambda o: "bfloat16 has units of its own here, and quantizing tokens takes what the product gains"),
]  # fmt: skip
"""Predicates and texts; the first that holds is said."""


def _processor(o: SlowLinear) -> str:
    return "processor" if o.device.type == "cpu" else "GPU"
