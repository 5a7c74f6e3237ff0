"""Attributes of diffusers' pipelines and models that have no public accessor. Nothing is imported from diffusers."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, HunyuanVideoFramepackTransformer3DModel, ModelMixin
    from torch import nn

Pipe = TypeVar("Pipe", bound="DiffusionPipeline")


def progress_bar_config(pipe: "DiffusionPipeline") -> dict[str, object]:
    """The settings that ``pipe.set_progress_bar_config`` was last called with; calling it with them restores them."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def replace_config(model: "ModelMixin", config: Mapping[str, object]) -> None:
    """Make ``config``, diffusers' ``FrozenDict``, all of ``model.config``; ``register_to_config`` would only add to it."""
    model._internal_dict = config


def name_repeated_blocks(model: "ModelMixin", classes: Iterable[str]) -> None:
    """Tell ``compile_repeated_blocks()`` the class names of what repeats, unless the model says so itself."""
    if not getattr(model, "_repeated_blocks", None):
        model._repeated_blocks = sorted(set(classes))


def repeated_block_names(model: object) -> tuple[str, ...]:
    """Class names of the blocks that diffusers' ``compile_repeated_blocks()`` compiles; none if the model says nothing."""
    return tuple(getattr(model, "_repeated_blocks", None) or ())


def kept_in_float32(model: object) -> tuple[str, ...]:
    """Parts of names of tensors that diffusers loads in float32 whatever type it is asked for; ``model`` may be a class."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def replace_apply(model: "ModelMixin", convert: Callable[..., "ModelMixin"] | None) -> None:
    """Let ``convert`` do what ``to()``, ``half()`` and ``cuda()`` do to ``model``; None restores the class's own method."""
    if convert is None:
        del model._apply
    else:
        model._apply = convert


def after_from_pretrained(cls: type["DiffusionPipeline"], change: Callable[[Pipe], Pipe]) -> None:
    """Let ``change`` have what ``cls.from_pretrained`` and that of its subclasses return; once, however often it is asked."""
    original = cls.__dict__["from_pretrained"].__func__
    if getattr(original, "_changed_by", None) is change:
        return

    @functools.wraps(original)
    def from_pretrained(cls: type["DiffusionPipeline"], /, *args: object, **kwargs: object) -> "DiffusionPipeline":
        return change(original(cls, *args, **kwargs))

    from_pretrained._changed_by = change  # type: ignore[attr-defined]
    cls.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]


def before_from_pipe(
    cls: type["DiffusionPipeline"],
    passed: Callable[["DiffusionPipeline", Mapping[str, tuple[object, ...]]], Mapping[str, object]],
) -> None:
    """Let ``passed`` add components to a call of ``cls.from_pipe``, and to that of its subclasses; once.

    Args:
        cls: diffusers' base class of pipelines.
        passed: takes the pipeline, and the classes of the new pipeline's components by name; returns components.
    """
    original = cls.__dict__["from_pipe"].__func__
    if getattr(original, "_passed_by", None) is passed:
        return

    @functools.wraps(original)
    def from_pipe(cls: type["DiffusionPipeline"], /, pipeline: "DiffusionPipeline", **kwargs: object) -> object:
        added = {} if "custom_pipeline" in kwargs else passed(pipeline, cls._get_signature_types())
        return original(cls, pipeline, **(dict(added) | kwargs))

    from_pipe._passed_by = passed  # type: ignore[attr-defined]
    cls.from_pipe = classmethod(from_pipe)  # type: ignore[attr-defined]


def after_from_pipe(
    cls: type, change: Callable[["DiffusionPipeline", "DiffusionPipeline"], "DiffusionPipeline"]
) -> None:
    """Let ``change`` have the pipeline that ``cls.from_pipe`` was given and the one it made, and return the one to use; once.

    Args:
        cls: diffusers' base class of pipelines, or one of its automatic pipelines.
        change: takes both pipelines, the given one first.
    """
    original = cls.__dict__["from_pipe"].__func__
    if getattr(original, "_changed_by", None) is change:
        return

    @functools.wraps(original)
    def from_pipe(cls: type, /, pipeline: "DiffusionPipeline", **kwargs: object) -> "DiffusionPipeline":
        return change(pipeline, original(cls, pipeline, **kwargs))

    from_pipe._changed_by = change  # type: ignore[attr-defined]
    cls.from_pipe = classmethod(from_pipe)  # type: ignore[attr-defined]


def offloading_hook(model: "nn.Module") -> str | None:
    """Class of a hook of accelerate's or diffusers' that moves a model's weights, or leaves parts of it out, around its calls;
    None if there is none. Hooks that only send inputs to a device do not count."""
    for part in model.modules():
        found = getattr(part, "_hf_hook", None)
        for hook in getattr(found, "hooks", [found]):
            if getattr(hook, "offload", False) or hasattr(hook, "prev_module_hook"):  # by parts, or as a whole
                return type(hook).__name__
        own = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        if own:
            return type(next(iter(own.values()))).__name__
    return None


def packed_history(
    framepack: "HunyuanVideoFramepackTransformer3DModel", *parts: object
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Tokens of a video behind those of its history, and the rotations of both, as Framepack's transformer packs them."""
    packed: tuple[Tensor, tuple[Tensor, Tensor]] = framepack._pack_history_states(*parts)
    return packed
