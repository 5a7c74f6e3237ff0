"""Plug-in point "prompt set": prompts of published benchmarks, from the files that their authors publish.

No file comes with this package; :data:`PROMPT_SETS` says by name how one is read, and ``fp4dit-ao evaluate --prompt-set NAME
--prompts FILE`` takes such a name.
"""

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fp4dit_ao.calibration import read_prompts
from fp4dit_ao.util.registry import Registry


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        text: what is drawn.
        name: its name in the set, such as a file's, from which some protocols derive its seed; its position if it has none.
    """

    text: str
    name: str


PromptSet = Callable[[Path], list[Prompt]]
"""Reads all prompts of a set, in the set's order, from a file or folder."""

LINES = "lines"
"""Name of the set that is a text file, one prompt a line."""
PROMPT_SETS: Registry[PromptSet] = Registry("prompt set")


def read_prompt_set(name: str, path: Path) -> list[Prompt]:
    """All prompts of the set ``name`` in ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no set has this name, or the file is not one of its kind; the message says what it must hold.
    """
    reader = PROMPT_SETS.find(name)
    if not path.exists():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        prompts = reader(path)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = next(info.summary for info in PROMPT_SETS.infos() if info.name == name)
        raise ValueError(
            f"{path} is no file of the prompt set {name} ({type(error).__name__}: {error}); expected {what}"
        ) from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts of the set {name}")
    return prompts


def shuffled(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts as deepcompressor takes them: the first of ``random.Random(0).shuffle``, then sorted by name."""
    taken = list(prompts)
    random.Random(0).shuffle(taken)
    return sorted(taken[:count], key=lambda prompt: prompt.name)


def _numbered(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(text, f"{index:05d}") for index, text in enumerate(texts)]


def _json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[Prompt]:
    return _numbered(read_prompts(path))


def _coco(path: Path) -> list[Prompt]:
    data = _json(path)
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    rows = data["annotations"]
    return [Prompt(row["caption"].strip(), f"{row['image_id']}-{row['id']}") for row in rows]


def _mjhq(path: Path) -> list[Prompt]:
    data = _json(path)
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    return [Prompt(row["prompt"], name) for name, row in data.items()]


def _column(path: Path, column: str) -> list[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        if column not in (rows.fieldnames or ()):
            raise KeyError(column)
        return _numbered([row[column].strip() for row in rows if row[column].strip()])


def _drawbench(path: Path) -> list[Prompt]:
    return _column(path, "Prompts")


def _parti(path: Path) -> list[Prompt]:
    return _column(path, "Prompt")


def _hpsv2(path: Path) -> list[Prompt]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        texts = _json(file)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{file.name} is not a JSON list of texts")
        found += [Prompt(text, f"{file.stem}-{index:05d}") for index, text in enumerate(texts)]
    return found


PROMPT_SETS.register(LINES, _lines, summary="a UTF-8 text file with one prompt a line")
PROMPT_SETS.register(
    "coco", _coco, summary="captions_val2014.json of MS-COCO: captions in the file's order",
    source="arXiv 1405.0312; FP4DiT draws the first 10 000",
)  # fmt: skip
PROMPT_SETS.register(
    "mjhq", _mjhq, summary="meta_data.json of MJHQ-30K: a JSON object of prompts by name",
    source="Playground v2.5, arXiv 2402.17245; deepcompressor draws 5000 (--sample shuffled)",
)  # fmt: skip
PROMPT_SETS.register(
    "drawbench",
    _drawbench,
    summary="DrawBench as .csv or .tsv with a column Prompts",
    source="Imagen, arXiv 2205.11487",
)
PROMPT_SETS.register(
    "parti", _parti, summary="PartiPrompts.tsv, with a column Prompt", source="Parti, arXiv 2206.10789"
)
PROMPT_SETS.register(
    "hpsv2", _hpsv2, summary="the folder of HPSv2's benchmark with anime.json, photo.json, …, or one of these files",
    source="HPS v2, arXiv 2306.09341",
)  # fmt: skip
