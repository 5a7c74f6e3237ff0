"""Codes to the bytes of a table of sixteen, in Triton: what the kernels of this folder share."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets its kernels (``TRITON_INTERPRET=1``), on tensors of the CPU."""


def _program(table: str, second_table: str, ending: str) -> str:
    """Assembly that looks eight codes, the nibbles of ``$2``, up in a table for the lower four and one for the upper four,
    each given by the four operands of its words.

    Each ``prmt`` picks four bytes of eight by four 3-bit selectors, and a third one picks between the table's halves by each
    code's top bit. ``first`` and ``second`` then hold four levels each, in the codes' order; ``ending`` makes the results
    ``$0`` and ``$1`` of them.
    """
    t0, t1, t2, t3 = table.split()
    u0, u1, u2, u3 = second_table.split()
    return f"""
{{
.reg .b32 magnitude, half, low, high, first, second;
and.b32 magnitude, $2, 0x77777777;
shr.u32 half, $2, 1;
and.b32 half, half, 0x44444444;
or.b32 half, half, 0x32103210;
prmt.b32 low, {t0}, {t1}, magnitude;
prmt.b32 high, {t2}, {t3}, magnitude;
prmt.b32 first, low, high, half;
shr.u32 magnitude, magnitude, 16;
shr.u32 half, half, 16;
prmt.b32 low, {u0}, {u1}, magnitude;
prmt.b32 high, {u2}, {u3}, magnitude;
prmt.b32 second, low, high, half;
{ending}
}}
"""


PROGRAM = _program(
    "$3 $7 $11 $15",
    "$5 $9 $13 $17",
    "prmt.b32 $0, first, second, 0x6420;\nprmt.b32 $1, first, second, 0x7531;",
)
"""Four packed bytes to eight levels: ``$0`` takes the low nibbles' levels, ``$1`` the high ones'. The first two bytes have the
first one's table, the others the third one's: tensor cores want pairs of bytes of two rows in one register."""
LOOKUP = tl.constexpr(PROGRAM)
WORD_PROGRAM = _program("$3 $4 $5 $6", "$3 $4 $5 $6", "mov.b32 $0, first;\nmov.b32 $1, second;")
"""A word of eight codes to two words of levels, in the codes' order, where each word has a table of its own."""
WORD_LOOKUP = tl.constexpr(WORD_PROGRAM)
WORD_CONSTRAINTS = tl.constexpr("=&r,=&r,r,r,r,r,r")
CONSTRAINTS = tl.constexpr("=r,=r" + ",r" * 17)  # a register of codes, and four for each word of the table
FP8_PROGRAM = """
{
.reg .b32 offset, low, high, zero;
.reg .b16 first, second;
xor.b32 offset, $1, 0x80808080;
mov.b32 zero, 0x64806480;
prmt.b32 low, offset, 0x64646464, 0x4140;
prmt.b32 high, offset, 0x64646464, 0x4342;
sub.rn.f16x2 low, low, zero;
sub.rn.f16x2 high, high, zero;
cvt.rn.satfinite.e4m3x2.f16x2 first, low;
cvt.rn.satfinite.e4m3x2.f16x2 second, high;
mov.b32 $0, {first, second};
}
"""
"""A word of four int8 levels to one of E4M3: a byte under 0x64 is the half number 1024 + byte, of which 1152 are taken off."""
FP8_ASSEMBLY = tl.constexpr(FP8_PROGRAM)


@triton.jit
def table_as_fp8(t0, t1, t2, t3, ASSEMBLY: tl.constexpr):
    """The words of a table, int8 levels, as E4M3, which must hold them."""
    if ASSEMBLY:
        return word_as_fp8(t0), word_as_fp8(t1), word_as_fp8(t2), word_as_fp8(t3)
    return as_fp8(t0), as_fp8(t1), as_fp8(t2), as_fp8(t3)


@triton.jit
def word_as_fp8(word):
    """:func:`as_fp8` by the assembly of GPUs that have E4M3."""
    return tl.inline_asm_elementwise(FP8_ASSEMBLY, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def as_fp8(word):
    """Four int8 levels in a word to four of E4M3, which must hold them."""
    return as_byte(word << 24) | as_byte(word << 16) << 8 | as_byte(word << 8) << 16 | as_byte(word) << 24


@triton.jit
def as_byte(level):
    """The int8 in the highest byte of ``level`` as E4M3, in the lowest byte."""
    value = (level >> 24).to(tl.float32).to(tl.float8e4nv)
    return value.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def level(code, t0, t1, t2, t3):
    """The table's byte for a code, by shifts: what ``LOOKUP`` does, on any backend."""
    word = tl.where(code < 8, tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3))
    return ((word >> ((code & 3) * 8)) & 0xFF).to(tl.uint8)


@triton.jit
def levels(packed, t0, t1, t2, t3, ASSEMBLY: tl.constexpr):
    """uint8 ``(N, K / 2)`` of two codes each to ``(N, K)`` bytes of the table, whose words are numbers.

    With ``ASSEMBLY``, four bytes that one thread holds are looked up at once. The table's words may be ``(N, 1)`` then, too, if
    the first two of the four are of one row, and the last two.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            LOOKUP, CONSTRAINTS, [packed, t0, t1, t2, t3], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    else:
        code = packed.to(tl.int32)
        low, high = level(code & 15, t0, t1, t2, t3), level(code >> 4, t0, t1, t2, t3)
    return tl.reshape(tl.join(low, high), (packed.shape[0], packed.shape[1] * 2))


@triton.jit
def words_of_levels(packed, t0, t1, t2, t3, ASSEMBLY: tl.constexpr):
    """int32 ``(N, K / 8)`` of eight codes each to int32 ``(N, K / 4)`` of four levels each; the table's words are numbers or
    ``(N, 1)``."""
    if ASSEMBLY:
        first, second = tl.inline_asm_elementwise(
            WORD_LOOKUP, WORD_CONSTRAINTS, [packed, t0, t1, t2, t3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        first, second = packed & 0, packed & 0
        for place in tl.static_range(4):
            first |= level((packed >> place * 4) & 15, t0, t1, t2, t3).to(tl.int32) << place * 8
            second |= level((packed >> 16 + place * 4) & 15, t0, t1, t2, t3).to(tl.int32) << place * 8
    return tl.reshape(tl.join(first, second), (packed.shape[0], packed.shape[1] * 2))
