"""Default call arguments of a pipeline: ``generation.json`` beside its ``model_index.json``."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FILE = "generation.json"
CallArguments = dict[str, Any]
"""Keyword arguments of a pipeline's call, of the types that the pipeline asks for."""


def generation_defaults(folder: str | Path) -> CallArguments:
    """Keyword arguments in ``folder/generation.json`` (steps, guidance, size, …); ``{}`` if there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair or delete it") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} must hold a JSON object of keyword arguments, found {type(data).__name__}; repair or delete it"
        )
    return data


def defaults_of(pipe: "DiffusionPipeline") -> CallArguments:
    """Default call arguments of ``pipe``: those it carries, or those of the folder that it was loaded from."""
    carried = vars(pipe).get("generation_defaults")
    if isinstance(carried, dict):
        return dict(carried)
    source = getattr(pipe, "name_or_path", None) or getattr(pipe, "config", {}).get("_name_or_path")
    return generation_defaults(source) if source and Path(source).is_dir() else {}


def call_arguments(pipe: "DiffusionPipeline", **call: object) -> CallArguments:
    """Merges ``call`` over the pipeline's own defaults.

    Raises:
        ValueError: the pipeline's ``__call__`` does not take one of ``call``.
    """
    unknown = sorted(set(call) - set(accepted(pipe, call)))
    if unknown:
        name = type(pipe).__name__
        raise ValueError(f"{name} takes no argument {', '.join(unknown)}; see help({name}.__call__)")
    return accepted(pipe, defaults_of(pipe)) | call


def accepted(pipe: "DiffusionPipeline", call: Mapping[str, object]) -> CallArguments:
    """Those of ``call`` that the pipeline's ``__call__`` takes by name.

    Raises:
        ValueError: text where the pipeline takes a number, or the other way round.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    taken = {name: value for name, value in call.items() if name in known}
    for name, value in taken.items():
        expected = _plain_types(known[name].annotation)
        if expected and isinstance(value, bool | int | float | str) and not isinstance(value, expected):
            wanted = " or ".join(sorted(one.__name__ for one in expected))
            raise ValueError(f"{name}={value!r}: {type(pipe).__name__} takes {wanted}; change it, also in {FILE}")
    return taken


_PLAIN = (bool, int, float, str)


def _plain_types(annotation: object) -> tuple[type, ...]:
    """Plain types in an annotation such as ``int | None``; a float may be a whole number. Empty if there are none."""
    found = tuple(one for one in (annotation, *get_args(annotation)) if one in _PLAIN)
    return (*found, int) if float in found else found
