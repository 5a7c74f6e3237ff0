"""What takes part: the float model, our recipes, and every peer, each with the way it is run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.config import RECIPES

Mode = Literal["eager", "compiled", "by block"]
FLOATS = ("float32", "bfloat16")
_SUFFIX: dict[Mode, str] = {"eager": "", "compiled": ", compiled", "by block": ", compiled by block"}


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        method: a float type, a recipe of ours, a peer's name, or something special to what is measured.
        mode: ``"compiled"``: the whole graph under ``torch.compile``; ``"by block"``: one block, for all of them.
    """

    method: str
    mode: Mode = "eager"

    @property
    def label(self) -> str:
        return self.method + _SUFFIX[self.mode]

    @property
    def dtype(self) -> str:
        """Name of the type of everything that is not quantized."""
        return self.method if self.method in FLOATS else PEERS[self.method].dtype if self.is_peer else "bfloat16"

    @property
    def is_peer(self) -> bool:
        return self.method in PEERS

    @property
    def is_recipe(self) -> bool:
        return self.method in RECIPES

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def peers(names: Sequence[str]) -> list["Variant"]:
        """Peers, each in the mode that suits it best."""
        return [Variant(name, PEERS[name].mode) for name in names]
