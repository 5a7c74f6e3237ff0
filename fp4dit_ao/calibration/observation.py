"""Runs calibration samples through the observers of a prepared graph."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.graph_capture.sample_description import tensors
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.passes.graph_stage import is_observed, misfit, require_graph
from fp4dit_ao.util.plain_mode import plain_mode


@plain_mode()
def calibrate(prepared: GraphModule, samples: Sequence[Mapping[str, object]], progress: bool = True) -> None:
    """Runs ``samples`` through a graph that ``prepare_pt2e`` returned, so that its observers see them.

    Args:
        prepared: the prepared graph; its observers are put into observing mode.
        samples: keyword arguments of ``forward``, such as :func:`collect_samples` returns; they are moved to the
            graph's device.
        progress: show a progress bar with the time left.

    Raises:
        ValueError: the graph has no observers, there are no samples, one does not match ``forward`` or has sizes or
            types that the graph cannot take, or one holds NaN or Inf.
    """
    if isinstance(samples, Mapping):
        raise ValueError("samples must be a list of dicts, one a forward call; found a single dict")
    if not samples:
        raise ValueError("calibration needs at least one sample; see collect_samples(pipe, prompts)")
    require_graph(prepared, "calibrate", "the result of prepare_pt2e")
    if not is_observed(prepared):
        raise ValueError(
            "calibrate: this graph has no observers of FP4DiTQuantizer; give it the result of prepare_pt2e, before convert_pt2e"
        )
    for index, sample in enumerate(samples):
        check_finite(sample, index)
    device = device_of(leave_inference_mode(prepared))
    set_fake_quantize(prepared, weight=False, activation=False)
    with torch.no_grad():
        for index, sample in enumerate(tqdm(samples, desc="calibration", unit="sample", disable=not progress)):
            try:
                arguments = bind(prepared, sample)
            except ValueError as error:
                raise ValueError(f"calibration sample {index}: {error}") from error
            try:
                prepared(**pytree.tree_map_only(Tensor, lambda x: x.to(device), arguments))
            except (AssertionError, RuntimeError) as error:
                wrong = misfit(prepared, _compat.flat_inputs(prepared, arguments))
                if wrong is None:
                    raise
                raise ValueError(f"calibration sample {index}: {wrong}") from error


def check_finite(sample: Mapping[str, object], index: int) -> None:
    """Raises ``ValueError`` if a tensor of ``sample`` (the ``index``-th) holds NaN or Inf."""
    for name, x in tensors(sample):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(
                f"calibration sample {index}: {name} of shape {tuple(x.shape)} holds {bad} NaN or Inf of {x.numel()} values; "
                "run the pipeline in a wider type, such as torch.bfloat16 instead of torch.float16"
            )


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer of ``model``; the CPU if it has none."""
    return next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
