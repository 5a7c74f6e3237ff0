"""The best combination of methods by measurement: parts are added one at a time, and kept where the model's output errs less.

The study of minifloats and integers (arXiv 2311.12359) reports for each format the best of weight equalization, SmoothQuant,
learned rounding or GPTQ, and bias correction. Here that is a search: from rounding to nearest, each part in turn, on
calibration samples that no part has seen.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table
from fp4dit_ao.util.world import current

Found = TypeVar("Found")

HELD_OUT = 1 / 10
"""Part of the calibration samples, the last ones, on which combinations are compared."""


@dataclass(frozen=True)
class Combination:
    """Methods that go together.

    Attributes:
        transforms: names, in order.
        rounding: name of the rounding rule.
        fine_tuning: name of the method; None for none.
    """

    transforms: tuple[str, ...] = ()
    rounding: str = "nearest"
    fine_tuning: str | None = None

    @property
    def name(self) -> str:
        """All parts, joined, as a folder may be named."""
        return "+".join((*self.transforms, self.rounding, *((self.fine_tuning,) if self.fine_tuning else ())))


@dataclass
class CombinationReport:
    """Record of what was tried.

    Attributes:
        errors: relative squared error of the model's output on held-out samples, by the combination's name.
        best: name of that with the least.
    """

    errors: dict[str, float] = field(default_factory=dict)
    best: str = ""

    def to_markdown(self) -> str:
        """A row for each combination, in the order in which they were tried."""
        rows = [[name, f"{error:.4g}", "best" if name == self.best else ""] for name, error in self.errors.items()]
        return markdown_table(["combination", "held-out error", ""], rows)


def parts(roundings: tuple[str, ...]) -> list[list[Callable[[Combination], Combination]]]:
    """Parts to try in turn: of each entry's changes of the combination so far, the best, if it errs less.

    Args:
        roundings: rules to try in place of nearest rounding.
    """

    def added(name: str) -> Callable[[Combination], Combination]:
        return lambda c: replace(c, transforms=(*c.transforms, name))

    def rounded(name: str) -> Callable[[Combination], Combination]:
        return lambda c: replace(c, rounding=name)

    return [
        [added("weight_equalization")],
        [added("smoothquant")],
        [rounded(name) for name in roundings],
        [lambda c: replace(c, fine_tuning="bias_correction")],
    ]


class CombinationSearch(Generic[Found]):
    """A search that remembers its best result.

    Args:
        quantize: makes a quantized model by a combination, resumed from the folder that it is given, if any.
        error: of such a model.
        roundings: rules to try besides nearest rounding.
        folder: for the errors so far and the state of each combination; a killed run goes on from it.
        key: hash of what errors depend on.
        progress: show a progress bar.
    """

    def __init__(
        self,
        quantize: Callable[[Combination, Path | None], Found],
        error: Callable[[Found], float],
        roundings: tuple[str, ...],
        folder: str | Path | None = None,
        key: str = "",
        progress: bool = False,
    ):
        self._quantize, self._error, self._parts = quantize, error, parts(roundings)
        self._folder, self._key, self._progress = None if folder is None else Path(folder), key, progress
        self.report = CombinationReport(self._stored())
        self._best: tuple[str, Found] | None = None

    def run(self) -> Found:
        """The model of the best combination; it is made again where a run before this one found it."""
        best = Combination()
        total = 1 + sum(map(len, self._parts))
        with tqdm(total=total, desc="combinations", disable=not self._progress) as bar:
            least = self._measured(best, bar)
            for changes in self._parts:
                tried = [(self._measured(found, bar), found) for found in (change(best) for change in changes)]
                error, found = min(tried, key=lambda pair: pair[0])
                if error < least:
                    least, best = error, found
        self.report.best = best.name
        if self._best is not None and self._best[0] == best.name:
            return self._best[1]
        return self._quantize(best, self._state(best))

    def _measured(self, combination: Combination, bar: tqdm) -> float:
        errors = self.report.errors
        bar.set_postfix_str(combination.name)
        if combination.name not in errors:
            found = self._quantize(combination, self._state(combination))
            error = current().gathered(self._error(found))[0]  # the first process's: all must go on alike
            if all(error < other for other in errors.values()):
                self._best = combination.name, found
            errors[combination.name] = error
            self._store()
        bar.update()
        return errors[combination.name]

    def _state(self, combination: Combination) -> Path | None:
        return None if self._folder is None else self._folder / combination.name

    def _stored(self) -> dict[str, float]:
        path = self._folder and self._folder / "combinations.json"
        text = current().agreed(lambda: path.read_text() if path and path.exists() else "")
        if not text:
            return {}
        found = json.loads(text)
        if found.get("key") != self._key:
            raise ValueError(
                f"{path} belongs to another run (other settings, weights or calibration data); repeat the settings of that "
                "run, or delete its folder to start anew"
            )
        return {str(name): float(error) for name, error in found["errors"].items()}

    def _store(self) -> None:
        if self._folder is not None and current().first:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / "combinations.json", json.dumps({"key": self._key, **asdict(self.report)}))
