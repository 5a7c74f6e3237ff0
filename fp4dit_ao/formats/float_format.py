"""Floating-point formats ``ExMy`` as integer lattices.

On its own finest step, every ``ExMy`` format is a set of integers (exponent field ``e``, mantissa field ``m``)::

    level(e, m) = m                        e = 0 (subnormal)
                = (2^M + m) * 2^(e - 1)    e >= 1

A tensor value is ``level * step`` with ``step = absmax / lattice_max``. That *is* the real-valued exponent bias of
FP4DiT (arXiv 2503.15465): ``b = 2^E - log2(maxval) + log2(2 - 2^-M) - 1`` and ``step = 2^(1 - b - M)``; see
:meth:`FloatFormat.exponent_bias`. A code is ``sign | exponent field | mantissa field``, so magnitudes sort like codes.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.formats.number_format import E4M3_BITS, E4M3_MAX, E4M3_STEP, MAX_BITS, NumberFormat

_PATTERN = re.compile(r"e(?P<e>[0-9]+)m(?P<m>[0-9]+)(?P<fn>fn)?|int(?P<int>[0-9]+)")


def is_float_format_name(name: object) -> bool:
    """Whether ``name`` is spelled like an ``ExMy`` or ``intN`` format, such as ``"e2m1"``, even if there is no such
    format."""
    return isinstance(name, str) and _PATTERN.fullmatch(name) is not None


@dataclass(frozen=True)
class FloatFormat(NumberFormat):
    """A signed ``ExMy`` number format without infinities: ``FloatFormat(2, 1)``, spelled ``"e2m1"``.

    Attributes:
        exponent_bits: E, 0 to 6. ``E = 0`` is the symmetric integer format (``e0m3`` = INT4, ±7 in sign and magnitude).
        mantissa_bits: M, 0 to 7.
        nan: whether the largest code is set aside for NaN, as in hardware FP8 (``e4m3fn``: largest value 448, not 480).

    Raises:
        ValueError: fewer than 1 or more than 7 magnitude bits, or levels that exceed 63-bit integers (e6m1, e7m0).
    """

    exponent_bits: int
    mantissa_bits: int
    nan: bool = False

    def __post_init__(self) -> None:
        e, m = self.exponent_bits, self.mantissa_bits
        if e < 0 or m < 0 or not 1 <= e + m < MAX_BITS:
            raise ValueError(f"format e{e}m{m} has {1 + e + m} bits; a format has 2 to {MAX_BITS}, such as 'e2m1'")
        if self.nan and (e == 0 or m == 0):
            raise ValueError(
                f"format e{e}m{m}fn: only formats with exponent and mantissa bits set a code aside for NaN"
            )
        if self.lattice_max >= 2**63:
            raise ValueError(f"format e{e}m{m} spans more than 63 bits of integers; use fewer exponent bits")

    @staticmethod
    def parse(name: str) -> "FloatFormat":
        """Format of a name: ``"e2m1"``, ``"e4m3fn"`` (hardware FP8), or ``"int4"`` for ``e0m3``;
        ``parse(str(fmt)) == fmt``.

        Raises:
            ValueError: ``name`` is not spelled like a format, or no such format exists.
        """
        found = _PATTERN.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(
                f"unknown number format {name!r}; write 'e2m1' for 2 exponent and 1 mantissa bits, "
                "'int4' for a symmetric integer"
            )
        if found["int"]:
            return FloatFormat(0, int(found["int"]) - 1)
        return FloatFormat(int(found["e"]), int(found["m"]), nan=found["fn"] is not None)

    def __str__(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}" + ("fn" if self.nan else "")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """Code of the largest value."""
        return 2 ** (self.bits - 1) - 1 - self.nan

    @property
    def max_binade(self) -> int:
        """Number k of the highest binade, whose levels are multiples of ``2^k`` steps."""
        return max(0, 2**self.exponent_bits - 2)

    @property
    def lattice_max(self) -> int:
        return self.level(self.max_code)

    @property
    def level_range(self) -> tuple[int, int]:
        return -self.lattice_max, self.lattice_max

    @property
    def is_exact_in_e4m3(self) -> bool:
        return self.mantissa_bits + (self.exponent_bits > 0) <= E4M3_BITS and self.lattice_max <= E4M3_MAX

    @property
    def is_rounded_by_e4m3(self) -> bool:
        """Whether the format is E4M3's lowest binades, so that hardware that rounds to E4M3 rounds to it.

        Both have three bits of mantissa, and a step here is E4M3's smallest subnormal, :data:`E4M3_STEP`.
        """
        fits = self.mantissa_bits == E4M3_BITS - 1 and self.exponent_bits > 0
        return fits and self.lattice_max * E4M3_STEP <= E4M3_MAX

    def level(self, code: int) -> int:
        magnitude = code & (2 ** (self.bits - 1) - 1)
        e, m = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        value = (2**self.mantissa_bits + m) << (e - 1) if e else m
        return -value if code >> (self.bits - 1) & 1 else value

    @property
    def lattice(self) -> Tensor:
        positive = [self.level(code) for code in range(self.max_code + 1)]
        return torch.tensor([-v for v in reversed(positive[1:])] + positive, dtype=torch.int64)

    def exponent_bias(self, maxval: float) -> float:
        """Real-valued exponent bias b for a largest magnitude ``maxval`` (arXiv 2503.15465):
        ``step = 2^(1 - b - M)``."""
        return 1 - self.mantissa_bits + math.log2(self.lattice_max / maxval)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def element_step(self, y: Tensor) -> Tensor:
        """Distance between neighbouring levels at ``y``: ``2^k`` for ``|y|`` in binade k; float32, in steps, like
        ``y``."""
        return _power_of_two(self._binade(y.float()))

    def encode(self, y: Tensor) -> Tensor:
        y = self._saturated(y)
        k = self._binade(y)
        magnitude = (k << self.mantissa_bits) + self._mantissa(y, k).abs().to(torch.int32)
        return (magnitude + (torch.signbit(y).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        code = codes.to(torch.int32)
        magnitude = code & (2 ** (self.bits - 1) - 1)
        e = magnitude >> self.mantissa_bits
        mantissa = (magnitude & (2**self.mantissa_bits - 1)) + ((e > 0).to(torch.int32) << self.mantissa_bits)
        level = mantissa.float() * _power_of_two((e - 1).clamp(min=0))
        return torch.where((code >> (self.bits - 1) & 1) > 0, -level, level)

    def round(self, y: Tensor) -> Tensor:
        """Levels nearest to ``y`` as float32: ``decode(encode(y))`` without computing codes, many times faster."""
        y = self._saturated(y)
        if y.is_cuda and self.is_rounded_by_e4m3:
            return rounded_by_e4m3(y)
        if y.is_cuda and not self.max_binade:
            return torch.round(y)
        if not self.mantissa_bits:
            k = self._binade(y)
            return self._mantissa(y, k) * _power_of_two(k)
        # the last bit of float32 is 2^k near 1.5 * 2^(k + 23): adding that rounds to multiples of 2^k, ties to even
        anchor = self._anchor(y)
        return (y + anchor) - anchor

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # the level above a binade's first negative value lies in the binade below, with the smaller step
        step = self.element_step(torch.where(y < 0, torch.nextafter(y, torch.zeros_like(y)), y))
        return torch.floor(y / step) * step, step

    def _anchor(self, y: Tensor) -> Tensor:
        lowest = 1.5 * 2.0**23
        if torch.compiler.is_compiling() and self.max_binade <= _FEW_BINADES:
            anchor = torch.full_like(y, lowest)
            for k in range(1, self.max_binade + 1):
                anchor = torch.where(y.abs() >= 2.0 ** (self.mantissa_bits + k), lowest * 2**k, anchor)
            return anchor
        binade = (y.view(torch.int32) & 0x7F800000).clamp(min=(127 + self.mantissa_bits) << 23).view(torch.float32)
        return binade * (lowest / 2**self.mantissa_bits)

    def _saturated(self, y: Tensor) -> Tensor:
        largest = float(self.lattice_max)
        if torch.compiler.is_compiling() or y.is_cuda:
            y = y.float().clamp(-largest, largest)
            return torch.where(y == y, y, 0.0)  # NaN becomes 0
        return torch.nan_to_num(y.float(), nan=0.0).clamp(-largest, largest)

    def _mantissa(self, y: Tensor, k: Tensor) -> Tensor:
        """``y`` of binade k in units of ``2^k``, rounded to whole numbers, ties to the even code."""
        mantissa = y * _power_of_two(-k)
        if self.mantissa_bits:
            return torch.round(mantissa)
        odd = (k & 1) * torch.sign(y)  # without mantissa bits the exponent decides whether a code is even
        return torch.round(mantissa - odd) + odd

    def _binade(self, y: Tensor) -> Tensor:
        """Binade k of ``y`` (float32), as int32: levels near ``y`` are multiples of 2^k; 0 in the subnormal range."""
        exponent = (y.view(torch.int32) >> 23 & 0xFF) - 127
        return (exponent - self.mantissa_bits).clamp(0, self.max_binade)


_FEW_BINADES = 6
"""Most binades for which compiled code finds the binade by comparisons: Inductor vectorises those on CPUs, but neither
reading the bits of a float nor ``nan_to_num``. In eager mode ``where`` is the one that is not vectorised."""


def rounded_by_e4m3(y: Tensor) -> Tensor:
    """Float32 ``y``, at most ``448 / E4M3_STEP``, rounded to the nearest multiple of its binade's step, ties to even, by the
    conversion to E4M3, which GPUs have an instruction for."""
    return (y * E4M3_STEP).to(torch.float8_e4m3fn).float() / E4M3_STEP


def _power_of_two(k: Tensor) -> Tensor:
    """Exact float32 ``2^k`` of int32 ``k`` in [-126, 127], made from bits instead of by libm, so exact on every
    backend."""
    return ((k + 127) << 23).view(torch.float32)
