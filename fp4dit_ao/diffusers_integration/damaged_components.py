"""Which component of a pipeline's folder cannot be loaded: diffusers and transformers say only what failed inside of it."""

import importlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from fp4dit_ao.checkpoint.tensor_files import read_json
from fp4dit_ao.util.sentences import first_line

INDEX = "model_index.json"
_NAMED = 4
"""Most files of a component that a message names."""


class _Loader(Protocol):
    """A class of diffusers, transformers or a pipeline, whose objects are read from a folder."""

    def from_pretrained(self, folder: str, *, local_files_only: bool) -> object: ...


def reason_not_loaded(folder: Path, error: Exception, loaded: Collection[str] = ()) -> str:
    """A sentence that names the component of ``folder`` that fails when it is loaded by itself, why, and the remedy.

    Args:
        folder: of a pipeline, with a valid index.
        error: what diffusers raised for the whole pipeline, which is blamed on the index where every component loads.
        loaded: names of components that are known to load.
    """
    index = read_json(folder / INDEX)
    assert isinstance(index, dict)
    for name, entry in index.items():
        if name in loaded or not isinstance(entry, list) or not all(entry) or not (folder / name).is_dir():
            continue
        library, cls = entry
        try:
            loader = getattr(importlib.import_module(library), cls)
        except ImportError:  # a module of the pipeline itself
            continue
        except AttributeError:
            return f"{folder / INDEX} names {cls} for {name}, and {library} has no such class; copy the file again"
        failed = _error_of(loader, folder / name)
        if failed is not None:
            return f"{folder / name} cannot be loaded as {cls}: {_words(failed)}; {_remedy(folder / name)}"
    return f"{folder / INDEX} does not describe a pipeline that can be loaded: {_words(error)}; copy the file again"


def _error_of(loader: _Loader, component: Path) -> Exception | None:
    """Error that ``loader.from_pretrained`` raises for a component; None if it loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loader.from_pretrained(str(component), local_files_only=True)
    except Exception as error:  # a damaged file can make a library raise anything
        return error
    return None


def _words(error: Exception) -> str:
    """An error's first line, with its type where that says more than the line."""
    line = first_line(error)
    return line if " " in line else f"{type(error).__name__} {line}"


def _remedy(component: Path) -> str:
    files = sorted(path.name for path in component.iterdir() if path.suffix == ".json")
    listed = ", ".join(files[:_NAMED]) if files else "its files"
    return f"check {listed} there, or copy the folder again"
