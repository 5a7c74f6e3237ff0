"""Units: the ways in which an operation can be computed, each with what it can take, and the table that picks one.

An operation (a linear, attention, the quantization of tokens, …) has a :class:`UnitTable`. The first unit whose predicate
accepts the operands runs. What runs and what is printed (``fp4dit-ao inspect``) ask the same table. To add a unit, write its
function and register it in front of the one that it outruns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Operands = TypeVar("Operands")


@dataclass(frozen=True)
class Unit(Generic[Operands]):
    """One way to compute an operation.

    Attributes:
        name: shown to people, such as ``"int8, Triton"``.
        supports: whether it computes the operation for these operands, exactly as the specification says.
        run: computes it; the signature is the same for all units of a table.
        detail: what differs from machine to machine, such as the instruction set; shown in parentheses.
        low_bit: whether it multiplies numbers of at most 8 bits; False for floats, which packed weights become first.
    """

    name: str
    supports: Callable[[Operands], bool]
    run: Callable[..., Any]
    detail: Callable[[], str] | None = None
    low_bit: bool = True

    def __str__(self) -> str:
        return self.name if self.detail is None else f"{self.name} ({self.detail()})"


class UnitTable(Generic[Operands]):
    """The units of one operation, most preferred first.

    Args:
        operation: its name, for messages.
        units: the last one should accept everything.
    """

    def __init__(self, operation: str, units: Iterable[Unit[Operands]]):
        self.operation = operation
        self.units = list(units)

    def pick(self, operands: Operands) -> Unit[Operands]:
        """The first unit that supports ``operands``.

        Raises:
            ValueError: none does.
        """
        for unit in self.units:
            if unit.supports(operands):
                return unit
        names = ", ".join(unit.name for unit in self.units)
        raise ValueError(f"{self.operation}: none of its units ({names}) supports {operands}")

    def register(self, unit: Unit[Operands], before: str) -> None:
        """Insert ``unit`` in front of the one named ``before``.

        Raises:
            ValueError: a unit of that name exists, or none is named ``before``.
        """
        names = [each.name for each in self.units]
        if unit.name in names:
            raise ValueError(f"{self.operation}: there already is a unit {unit.name!r}; choose another name")
        if before not in names:
            raise ValueError(f"{self.operation}: there is no unit {before!r} to register before; choose one of {names}")
        self.units.insert(names.index(before), unit)
