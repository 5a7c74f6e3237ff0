"""Participants of a benchmark: the float model, our recipes, and peers, each with the mode that it runs in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.config import RECIPES

Mode = Literal["eager", "compiled", "by block"]
FLOATS = ("float32", "bfloat16")
_SUFFIX: dict[Mode, str] = {"eager": "", "compiled": ", compiled", "by block": ", compiled by block"}


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        method: a float type, a recipe of ours, a peer's name, or a name that only one workload knows.
        mode: ``"compiled"`` runs the whole graph under ``torch.compile``, ``"by block"`` compiles each kind of block
            once.
    """

    method: str
    mode: Mode = "eager"

    @property
    def label(self) -> str:
        """Title of the row."""
        return self.method + _SUFFIX[self.mode]

    @property
    def dtype(self) -> str:
        """Name of the type of all tensors that are not quantized."""
        return self.method if self.method in FLOATS else PEERS[self.method].dtype if self.is_peer else "bfloat16"

    @property
    def is_peer(self) -> bool:
        """Whether the method is another package's."""
        return self.method in PEERS

    @property
    def is_recipe(self) -> bool:
        """Whether the method is one of our recipes."""
        return self.method in RECIPES

    def to_dict(self) -> dict[str, str]:
        """Fields as JSON, which are also options of workloads."""
        return asdict(self)

    @staticmethod
    def peers(names: Sequence[str]) -> list["Variant"]:
        """Variants of the named peers, each in its fastest mode."""
        return [Variant(name, PEERS[name].mode) for name in names]
