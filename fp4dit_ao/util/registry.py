"""Registries of plug-in points: methods by name, with their sources and costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Method = TypeVar("Method")


@dataclass(frozen=True)
class MethodInfo:
    """One row of ``fp4dit_ao.methods()``.

    Attributes:
        point: plug-in point, such as ``"rounding"``.
        name: name that configs and the command line take.
        summary: description in one sentence.
        source: paper, and equation or section; ``""`` for a baseline without one.
        cost: cost beyond nearest rounding, such as ``"seconds"`` or
            ``"a Hessian for each linear, then seconds"``.
    """

    point: str
    name: str
    summary: str
    source: str
    cost: str


class Registry(Mapping[str, Method], Generic[Method]):
    """Methods of one plug-in point by name, in the order of registration.

    Args:
        point: name of the plug-in point, for messages and ``fp4dit_ao.methods()``.
    """

    def __init__(self, point: str):
        self.point = point
        self._methods: dict[str, Method] = {}
        self._infos: dict[str, MethodInfo] = {}

    def register(self, name: str, method: Method, *, summary: str, source: str = "", cost: str = "") -> Method:
        """Adds ``method`` under ``name``, with the fields of :class:`MethodInfo`; returns it.

        Raises:
            ValueError: another method has this name.
        """
        if self._methods.get(name, method) is not method:
            raise ValueError(f"there is another {self.point} named {name!r}; choose a name of its own")
        self._methods[name] = method
        self._infos[name] = MethodInfo(self.point, name, summary, source, cost)
        return method

    def find(self, name: str) -> Method:
        """Method named ``name``.

        Raises:
            ValueError: there is none; the message lists the known names.
        """
        if not isinstance(name, str) or name not in self._methods:
            raise ValueError(f"unknown {self.point} {name!r}; choose one of {', '.join(self._methods)}")
        return self._methods[name]

    def infos(self) -> list[MethodInfo]:
        """Descriptions of all methods, in the order of registration."""
        return list(self._infos.values())

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)
