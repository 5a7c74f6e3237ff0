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
