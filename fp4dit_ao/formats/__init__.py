"""Low-bit number formats as integer lattices: ``ExMy`` floating point, and codebooks.

A format is a finite set of integers, the *levels*; a tensor value is a level times a scale. An ``ExMy`` format
(:class:`FloatFormat`) computes its levels, a codebook (:class:`CodebookFormat`, such as NF4) lists them. :func:`parse`
returns the format of a name.
"""

from fp4dit_ao.formats.codebook import CodebookFormat
from fp4dit_ao.formats.float_format import FloatFormat
from fp4dit_ao.formats.number_format import NumberFormat
from fp4dit_ao.formats.packing import pack, unpack
from fp4dit_ao.formats.registry import CODEBOOKS, parse, register_codebook

__all__ = ["CODEBOOKS", "CodebookFormat", "FloatFormat", "NumberFormat", "pack", "parse", "register_codebook", "unpack"]
