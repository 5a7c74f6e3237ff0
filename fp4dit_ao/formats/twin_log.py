"""Twin log formats (LRQ-DiT, arXiv 2508.03485): levels evenly spaced in ``log2(|w| + eta)``, for each sign by itself.

    u = log2(|w| + eta),    |w| = 2^u - eta,    u from log2(eta) (zero) to log2(max + eta)

With 4 bits, positive weights have 8 levels and negative ones 9, zero among both, as in the authors' code. A small ``eta`` puts
most levels near zero, like E3M0; a large one spaces them evenly, like INT4. The code searches eta for each layer, among 13
absolute values; here it is relative to the largest magnitude, and four values are four formats, among which a layer takes the
one that errs least at its output (``QuantConfig.weight_candidates``, recipe ``w4a4_twin_log``). Both signs share a scale, which
is searched for; in the code each has a largest magnitude of its own, from a percentile that takes entries of the other sign for
zeros of the logarithm, and so rarely cuts. Levels are times 127, and rounded to int8: products are exact on int8 units.
"""

import math

from fp4dit_ao.formats.codebook import CodebookFormat

ETAS = {"twin_log_2": 0.02, "twin_log_8": 0.08, "twin_log_30": 0.3, "twin_log_100": 1.0}
"""eta over the largest magnitude, by the format's name."""
_LARGEST = 127


def twin_log(name: str, eta: float) -> CodebookFormat:
    """The format of sixteen levels with this ``eta``, positive, relative to the largest magnitude."""
    negative, positive = (_side(eta, steps) for steps in (8, 7))
    return CodebookFormat(name, (*(-level for level in reversed(negative)), 0, *positive))


def _side(eta: float, steps: int) -> list[int]:
    """The magnitudes of one sign, without zero."""
    low, high = math.log2(eta), math.log2(1 + eta)
    values = [2 ** (low + (high - low) * step / steps) - eta for step in range(1, steps + 1)]
    return [round(_LARGEST * value) for value in values]


TWIN_LOGS = {name: twin_log(name, eta) for name, eta in ETAS.items()}
