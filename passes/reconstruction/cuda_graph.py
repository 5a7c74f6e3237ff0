"""A step as a CUDA graph: launched as a whole, since a block's some thousand kernels take longer to launch than to run."""

import warnings
from collections.abc import Callable

import torch

from fp4dit_ao.passes.reconstruction.minibatches import Minibatches
from fp4dit_ao.passes.reconstruction.objectives import Objective

WARM_UP = 3
"""Steps before a capture: they compile, tune, and allocate what the optimizer keeps."""


def can_capture(minibatches: Minibatches, objective: Objective, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all steps of a unit do the same on the same memory of a GPU."""
    groups = optimizer.param_groups
    asks_for_more = objective.needs_layers or objective.needs_tail or objective.drop > 0  # gathers rows of its own
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return minibatches.fixed and on_gpu and not asks_for_more and all(group.get("capturable") for group in groups)


class Captured:
    """``step`` without arguments, captured after :data:`WARM_UP` calls and replayed from then on.

    If it cannot be captured, a warning says why, and calls go on one kernel at a time.

    Args:
        step: reads and writes the same memory in every call, and never waits for the device.
        device: the GPU.

    Attributes:
        graph: None until it is captured.
    """

    def __init__(self, step: Callable[[], None], device: torch.device):
        self._step, self._calls = step, 0
        self._stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Take a step."""
        if self._calls == WARM_UP:
            self._capture()
        self._calls += 1
        if self.graph is not None:
            self.graph.replay()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
        except Exception as error:
            torch.cuda.synchronize()
            warnings.warn(
                f"steps are launched one kernel at a time, for they cannot be captured: {error}", stacklevel=2
            )
            return
        self.graph = graph
