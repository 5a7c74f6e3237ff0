"""A checkpoint per reconstructed unit, so that a killed run resumes and ends with the same bits."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.fingerprint import fingerprint as hash_of
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.report import BlockReport
from fp4dit_ao.passes.reconstruction.rounding import RoundingRule
from fp4dit_ao.util.tensor_state import load_state, save_state
from fp4dit_ao.util.world import World

_SCALE = "#scale"
"""Follows a weight's name: its learned scale."""


def fingerprint(
    prepared: GraphModule, samples: Sequence[Mapping[str, object]], config: ReconstructionConfig, rule: RoundingRule
) -> str:
    """SHA-256 over everything that the result depends on: settings, graph, weights, formats and data.

    An ``AdaRoundConfig`` counts as the ``ReconstructionConfig`` that it stands for.
    """
    settings = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(ReconstructionConfig)]
    return hash_of(f"{settings} {rule!r}", prepared, samples)


class Store:
    """The units of one run, a file each; the first process reads and writes them for all.

    Raises:
        ValueError: the folder is a file, or holds units of another run (other settings, weights or data), or a broken file.
    """

    def __init__(self, folder: str | Path, fingerprint: str, world: World):
        self.folder, self.fingerprint, self.world = Path(folder), fingerprint, world
        if len(set(world.gathered(fingerprint))) > 1:
            raise ValueError(
                "the processes have different models, settings or calibration data; give all of them the same (numbers can "
                "differ in their last bits between kinds of processors and GPUs)"
            )
        if self.folder.is_file():
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} is a file; give a folder, or the name of one to make"
            )
        world.agreed(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:03d}.safetensors"

    def save(self, index: int, segment: Segment, row: BlockReport) -> None:
        """Write one finished unit; a kill leaves either all of it or nothing."""
        if not self.world.first:
            return
        tensors = {o.name: o.codes for o in _observers(segment) if o.codes is not None}
        tensors |= {f"{o.name}{_SCALE}": o.scale for o in _observers(segment) if o.rescaled and o.scale is not None}
        texts = {"fingerprint": self.fingerprint, "row": json.dumps(dataclasses.asdict(row))}
        save_state(self._path(index), tensors, texts)

    def load(self, index: int, segment: Segment) -> BlockReport | None:
        """Restore one unit's codes, and scales that were learned; None if it was not finished."""
        found = self.world.agreed(lambda: self._read(self._path(index)))
        if found is None:
            return None
        tensors, row = found
        for observer in _observers(segment):
            codes, scale = tensors.get(observer.name), tensors.get(f"{observer.name}{_SCALE}")
            assert observer.scale is not None  # every weight was quantized before units are rounded
            device = observer.scale.device
            observer.settle(
                Settled(
                    None if codes is None else codes.to(device),
                    observer.scale if scale is None else scale.to(device),
                )
            )
        return row

    def _read(self, path: Path) -> tuple[dict[str, Tensor], BlockReport] | None:
        """A file's codes, learned scales and row of the report; None if there is no file."""
        if not path.exists():
            return None
        remedy = "delete it to reconstruct that part again"
        tensors, texts = load_state(path, remedy)
        if texts.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{path} belongs to another run (other settings, weights or calibration data); "
                "repeat the settings of that run, or delete this folder to start anew"
            )
        try:
            return tensors, BlockReport(**json.loads(texts["row"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken (its row of the report cannot be read: {error!r}); {remedy}") from error


def _observers(segment: Segment) -> Iterator[WeightObserver]:
    return (observer for _, observer in segment.observers)
