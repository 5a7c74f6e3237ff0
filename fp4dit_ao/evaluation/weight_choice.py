"""Choice of the form that each linear's weight is held in: the fastest that memory allows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Form(NamedTuple):
    """One form of a linear's weight.

    Attributes:
        name: what ``unpack_weights`` calls it, or ``"packed"``.
        seconds: of the linear with it.
        bytes: that it takes.
    """

    name: str
    seconds: float
    bytes: int


def fastest_forms(layers: Mapping[str, Sequence[Form]], memory: int | None) -> dict[str, str]:
    """Names of the forms of every linear that is not left as it is.

    Memory goes to where a byte saves most time: changes are made in the order of seconds saved for each byte, as long as what
    is left holds them.

    Args:
        layers: forms by the name of a linear; the first is the one it has.
        memory: bytes that all of them together may take more than now; None for any number.
    """
    changes = [
        (_gain(forms[0], form), name, form)
        for name, forms in layers.items()
        for form in forms[1:]
        if form.seconds < forms[0].seconds
    ]
    changes.sort(key=lambda change: change[0], reverse=True)  # stable: of equals, the first layer
    chosen = {name: forms[0] for name, forms in layers.items()}
    for _, name, form in changes:
        now = chosen[name]
        more = form.bytes - now.bytes
        if form.seconds < now.seconds and (memory is None or more <= max(0, memory)):
            chosen[name] = form
            memory = None if memory is None else memory - more
    return {name: form.name for name, form in chosen.items() if form is not layers[name][0]}


def _gain(now: Form, form: Form) -> float:
    """Seconds saved for each byte more."""
    more = form.bytes - now.bytes
    return (now.seconds - form.seconds) / more if more > 0 else float("inf")
