"""Calls of a transformer that compute shapes alone, for seeing how a pipeline calls it without drawing a picture."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree


@contextlib.contextmanager
def uncomputed(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which calls of ``models`` give zeros, of the shapes and types that they would have, and read no weight.

    A model whose shapes depend on values is computed.
    """
    replaced = [(model, vars(model).get("forward")) for model in models]  # a hook's or an offloader's own, if any
    for model, _ in replaced:
        model.forward = _shapes_of(model.forward)
    try:
        yield
    finally:
        for model, own in replaced:
            if own is None:
                del model.forward
            else:
                model.forward = own


def _shapes_of(forward: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(forward)
    def shapes(*args: object, **kwargs: object) -> object:
        mode = _compat.fake_mode()
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            with mode:
                output = forward(*fake_args, **fake_kwargs)
        except RuntimeError:  # fake tensors have no values to decide by
            return forward(*args, **kwargs)
        return pytree.tree_map_only(Tensor, _zeros, output)

    return shapes


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
