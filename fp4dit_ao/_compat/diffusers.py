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

    def changed(original: Callable[..., Pipe], own: type, *args: object, **kwargs: object) -> Pipe:
        return change(original(own, *args, **kwargs))

    _replace(cls, "from_pretrained", changed, change)


def before_from_pipe(
    cls: type["DiffusionPipeline"],
    passed: Callable[["DiffusionPipeline", Mapping[str, tuple[object, ...]]], Mapping[str, object]],
) -> None:
    """Let ``passed`` add components to a call of ``cls.from_pipe``, and to that of its subclasses; once.

    Args:
        cls: diffusers' base class of pipelines.
        passed: takes the pipeline, and the classes of the new pipeline's components by name; returns components.
    """

    def given_more(
        original: Callable[..., Pipe], own: type["DiffusionPipeline"], pipeline: "DiffusionPipeline", **kwargs: object
    ) -> Pipe:
        added = {} if "custom_pipeline" in kwargs else passed(pipeline, own._get_signature_types())
        return original(own, pipeline, **(dict(added) | kwargs))

    _replace(cls, "from_pipe", given_more, passed)


def after_from_pipe(cls: type, change: Callable[["DiffusionPipeline", Pipe], Pipe]) -> None:
    """Let ``change`` have the pipeline that ``cls.from_pipe`` was given and the one it made, and return the one to use; once.

    Args:
        cls: diffusers' base class of pipelines, or one of its automatic pipelines.
        change: takes both pipelines, the given one first.
    """

    def changed(original: Callable[..., Pipe], own: type, pipeline: "DiffusionPipeline", **kwargs: object) -> Pipe:
        return change(pipeline, original(own, pipeline, **kwargs))

    _replace(cls, "from_pipe", changed, change)


def _replace(cls: type, method: str, by: Callable[..., object], mark: object) -> None:
    """Replaces a class method of ``cls`` by ``by``, which is given the former one before the arguments; once for each mark."""
    original = cls.__dict__[method].__func__
    marks = vars(original).get("_marks", ())
    if mark in marks:
        return

    @functools.wraps(original)
    def replacement(own: type, /, *args: object, **kwargs: object) -> object:
        return by(original, own, *args, **kwargs)

    vars(replacement)["_marks"] = (*marks, mark)
    setattr(cls, method, classmethod(replacement))


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
