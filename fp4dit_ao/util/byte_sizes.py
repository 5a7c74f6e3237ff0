"""Amounts of memory as people write them."""

import re

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", re.IGNORECASE)


def byte_count(size: int | str) -> int:
    """Bytes in ``size``: a whole number, or a text such as ``"8GB"``, ``"1.5 GiB"`` or ``"800MB"``.

    Raises:
        ValueError: it is neither, or not more than 0.
    """
    found = _SIZE.fullmatch(str(size).strip()) if not isinstance(size, bool) else None
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or not int(float(found[1]) * unit):
        raise ValueError(f"{size!r} is no amount of memory; give a number and a unit, such as 8GB or 800MB")
    return int(float(found[1]) * unit)
