"""Pipelines with default call arguments: a folder's ``generation.json`` holds for ``pipe(prompt)``, too.

Diffusers has no place for them, so a pipeline that has some becomes an instance of a subclass of its class, by the same name,
that adds them to every call and writes them when it is saved. This happens to what this package loads and quantizes, and, once
``fp4dit_ao`` is imported, to what ``from_pretrained`` loads from a folder that has such a file, and to what ``from_pipe`` makes
of such a pipeline.
"""

import functools
import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fp4dit_ao import _compat
from fp4dit_ao.calibration import pipeline_arguments

Pipe = TypeVar("Pipe", bound=DiffusionPipeline)


def with_call_defaults(pipe: Pipe) -> Pipe:
    """Makes ``pipe(…)`` use the pipeline's own default arguments where the call gives none; returns ``pipe`` itself.

    Nothing changes if it has none, or is such a pipeline already.
    """
    defaults = pipeline_arguments.defaults_of(pipe)
    if defaults and not isinstance(pipe, _Defaults):
        pipe.generation_defaults = defaults
        plain: Any = type(pipe)  # a class is hashable, which mypy does not see
        pipe.__class__ = _subclass(plain)
    return pipe


def with_call_defaults_of(pipe: DiffusionPipeline, new: Pipe) -> Pipe:
    """Makes ``new(…)`` use the default arguments of ``pipe``, the pipeline that it was made of; returns ``new`` itself."""
    if defaults := pipeline_arguments.defaults_of(pipe):
        new.generation_defaults = defaults
    return with_call_defaults(new)


class _Defaults:
    """Mixin before a pipeline's class; see :func:`with_call_defaults`."""

    _plain: type[DiffusionPipeline]

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """Saves the pipeline as diffusers does, and its default arguments in ``generation.json``."""
        self._plain.save_pretrained(self, save_directory, *args, **kwargs)
        if defaults := pipeline_arguments.defaults_of(self):  # type: ignore[arg-type]
            text = json.dumps(defaults, indent=2) + "\n"
            (Path(save_directory) / pipeline_arguments.FILE).write_text(text, encoding="utf-8")

    def __reduce__(self) -> tuple[object, ...]:
        return _empty, (self._plain,), vars(self).copy()


@functools.cache
def _subclass(plain: type[DiffusionPipeline]) -> type[_Defaults]:
    """Subclass of the pipeline class ``plain`` that looks like it: name, module, documentation, signature of a call."""
    signature = inspect.signature(plain.__call__)

    @functools.wraps(plain.__call__)
    def call(self: DiffusionPipeline, *args: object, **kwargs: object) -> object:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        defaults = pipeline_arguments.accepted(self, pipeline_arguments.defaults_of(self))
        return plain.__call__(self, *args, **{k: v for k, v in defaults.items() if k not in given}, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    own = {name: getattr(plain, name) for name in names} | {"__call__": call, "_plain": plain}
    return type(plain.__name__, (_Defaults, plain), own)


def _empty(plain: Any) -> _Defaults:
    made = _subclass(plain)
    return made.__new__(made)


_compat.after_from_pretrained(DiffusionPipeline, with_call_defaults)
_compat.after_from_pipe(DiffusionPipeline, with_call_defaults_of)
