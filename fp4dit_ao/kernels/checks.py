"""How operators refuse arguments: which one, what was found, what was expected."""

from typing import NoReturn


def refuse(operator: str, argument: str, found: object, expected: object) -> NoReturn:
    """Raise ``ValueError``.

    Called behind an ``if``, so that a call with good arguments pays for the comparison alone.
    """
    raise ValueError(f"{operator}: {argument} has {found}; expected {expected}")
