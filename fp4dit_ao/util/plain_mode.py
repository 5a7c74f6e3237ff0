"""Work outside of ``torch.autocast`` and ``torch.inference_mode``, which a caller may be in."""

import contextlib
from collections.abc import Iterator

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Turns ``torch.autocast`` and ``torch.inference_mode`` off, and leaves gradients as they are. Also a decorator.

    A graph that is captured under the first holds its casts, and weights are rounded by products in half precision. Tensors
    that are made in the second have no gradients later, nor can parameters be made of them.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            stack.enter_context(torch.no_grad())
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
