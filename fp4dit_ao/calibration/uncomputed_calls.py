"""Calls of a transformer that compute shapes alone, for seeing how a pipeline calls it without drawing a picture."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree

_AT_PRESENT: WeakSet[nn.Module] = WeakSet()
"""Models whose calls give zeros at present."""


@contextlib.contextmanager
def uncomputed(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which calls of ``models`` give zeros, of the shapes and types that they would have, and read no weight.

    Shapes are found once for all calls whose arguments have equal shapes. A model whose shapes depend on values is computed,
    once likewise; one that is offloaded is computed, since its hooks would move weights that are not there.
    """
    replaced = [(model, vars(model).get("forward")) for model in models if _compat.offloading_hook(model) is None]
    for model, _ in replaced:
        model.forward = _shapes_of(model.forward)
        _AT_PRESENT.add(model)
    try:
        yield
    finally:
        for model, own in replaced:
            _AT_PRESENT.discard(model)
            if own is None:
                del model.forward
            else:
                model.forward = own


def is_uncomputed(model: nn.Module) -> bool:
    """Whether calls of ``model`` give zeros at present, and so cost next to nothing."""
    return model in _AT_PRESENT


def _shapes_of(forward: Callable[..., object]) -> Callable[..., object]:
    known: dict[object, object] = {}

    @functools.wraps(forward)
    def shapes(*args: object, **kwargs: object) -> object:
        key = _shapes_in(args, kwargs)
        if key in known:
            return pytree.tree_map_only(Tensor, _zeros, known[key])
        mode = _compat.fake_mode()
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            with mode:
                fake = forward(*fake_args, **fake_kwargs)
            output = pytree.tree_map_only(Tensor, _zeros, fake)
        except RuntimeError:  # fake tensors have no values to decide by
            output = forward(*args, **kwargs)
        known[key] = pytree.tree_map_only(Tensor, _without_storage, output)
        return output

    return shapes


def _shapes_in(args: object, kwargs: object) -> str:
    """Key under which the shapes of results are kept: the arguments, and of tensors all but their values."""
    described = pytree.tree_map_only(Tensor, lambda x: (tuple(x.shape), x.dtype, x.device), (args, kwargs))
    return repr(described)


def _without_storage(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
