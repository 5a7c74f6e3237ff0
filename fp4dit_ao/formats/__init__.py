"""Low-bit number formats as integer lattices: ``ExMy`` floating point, and codebooks.

A format is a finite set of integers, the *levels*; a tensor value is a level times a scale. An ``ExMy`` format
(:class:`FloatFormat`) computes its levels, a codebook (:class:`CodebookFormat`, such as NF4) lists them. :func:`parse`
returns the format of a name. In a :class:`CodebookSet`, each group of a weight has a codebook of its own.
"""

from fp4dit_ao.formats.codebook import CodebookFormat
from fp4dit_ao.formats.codebook_groups import CodebookSet
from fp4dit_ao.formats.float_format import FloatFormat
from fp4dit_ao.formats.number_format import NumberFormat
from fp4dit_ao.formats.packing import pack, unpack
from fp4dit_ao.formats.registry import (
    CODEBOOK_SETS,
    CODEBOOKS,
    codebook_set,
    parse,
    register_codebook,
    register_codebook_set,
)

__all__ = [
    "CODEBOOKS", "CODEBOOK_SETS", "CodebookFormat", "CodebookSet", "FloatFormat", "NumberFormat", "codebook_set", "pack",
    "parse", "register_codebook", "register_codebook_set", "unpack",
]  # fmt: skip
