"""Quantization schemes: each owns its observers, tensor class, stored parts, lowered linear and description in files.

:data:`SCHEMES` has them by name, and :func:`scheme_of` finds the one that a config means. To add one: rules for its configs
(``config.scheme_rules.SchemeRules``), an object that satisfies :class:`QuantizationScheme`, and a line below.
"""

from fp4dit_ao.schemes.block_scaled import BlockScaledScheme
from fp4dit_ao.schemes.codebook_groups import CodebookGroupsScheme
from fp4dit_ao.schemes.grouped import GroupedScheme
from fp4dit_ao.schemes.scheme import (
    SCHEMES,
    LowBitLinear,
    ObserverSpec,
    PlainLinear,
    QuantizationScheme,
    owner_of,
    register_scheme,
    scheme_of,
)

register_scheme(
    GroupedScheme(),
    summary="Levels of a number format times a float scale for each group, channel or tensor",
    source="arXiv 2503.15465",
)
register_scheme(
    BlockScaledScheme(),
    summary="MX and NVFP4: 32 or 16 elements share a low-bit scale",
    source="OCP Microscaling Formats 1.0; NVIDIA NVFP4",
)
register_scheme(
    CodebookGroupsScheme(),
    summary="Each group of a weight has one of sixteen codebooks, each row one float: one product of 8-bit integers a linear",
    cost="seconds to minutes a model for the search",
)

__all__ = [
    "SCHEMES", "LowBitLinear", "ObserverSpec", "PlainLinear", "QuantizationScheme", "owner_of", "register_scheme", "scheme_of",
]  # fmt: skip
