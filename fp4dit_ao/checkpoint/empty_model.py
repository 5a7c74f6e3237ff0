"""Float models without weights, made from a diffusers config on the meta device."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fp4dit_ao.util.sentences import first_line


def empty_model(
    config: Mapping[str, object], limit: int | None = None, buffers: bool = False, cls: type[nn.Module] | None = None
) -> nn.Module:
    """Makes the float model that ``config`` describes, on the meta device.

    Args:
        config: a diffusers config.
        limit: most parameters that the model may have; any number if None.
        buffers: whether buffers get real values, as the model initialises them.
        cls: class of the model; the one in diffusers that ``config`` names if None.

    Raises:
        ValueError: diffusers has no such model class, it does not accept this config, or the model exceeds ``limit``.
    """
    import diffusers

    name = config.get("_class_name")
    if cls is None:
        cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no model class {name!r}; install a version that does")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with _on_meta(buffers), _at_most(limit):
            model: nn.Module = cls.from_config(plain).eval()  # type: ignore[attr-defined]
            return model
    except Exception as error:
        raise ValueError(f"{name} cannot be made from its config: {first_line(error)}") from error


def _on_meta(but_buffers: bool) -> contextlib.AbstractContextManager[object]:
    if not but_buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights

    context: contextlib.AbstractContextManager[object] = init_empty_weights(include_buffers=False)
    return context


@contextlib.contextmanager
def _at_most(limit: int | None) -> Iterator[None]:
    """Context that raises ``ValueError`` once modules have registered more than ``limit`` parameters."""
    count = 0

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if limit is not None and count > limit:
            raise ValueError(f"it has more than the {limit} parameters that go with what is stored")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
