"""The error of a prepared graph's outputs, as the student, from its own as the teacher."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao._compat import pytree
from fp4dit_ao.observers import set_fake_quantize

Call = Mapping[str, object]


def calls_of(prepared: GraphModule, samples: Sequence[Call]) -> list[Call]:
    """The samples, on the graph's device.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("no samples; collect_samples(pipe, prompts) records some")
    device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    return [pytree.tree_map_only(Tensor, lambda x: x.to(device), dict(sample)) for sample in samples]


@torch.no_grad()
def teacher(prepared: GraphModule, calls: Sequence[Call]) -> list[list[Tensor]]:
    """Outputs of the float graph for every sample; observers stay paused."""
    set_fake_quantize(prepared, weight=False, activation=False, paused=True)
    return [outputs_of(prepared, call) for call in calls]


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error of tensors relative to the power of what they should be, in the mean over the tensors."""
    parts = [
        nn.functional.mse_loss(y.float(), wanted.float()) / wanted.float().square().mean().clamp_min(1e-30)
        for y, wanted in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).mean()


@torch.no_grad()
def total_error(model: GraphModule, calls: Sequence[Call], targets: Sequence[Sequence[Tensor]]) -> float:
    """Mean over the samples of :func:`relative_error` of the model's outputs."""
    pairs = zip(calls, targets, strict=True)
    return sum(float(relative_error(outputs_of(model, call), target)) for call, target in pairs) / len(calls)


def outputs_of(model: GraphModule, call: Call) -> list[Tensor]:
    """The tensors among a model's outputs."""
    return [x for x in pytree.tree_leaves(model(**call)) if isinstance(x, Tensor)]
