"""Convert and lower in one pass, weight by weight, so that unpacked codes of one weight at a time are in memory."""

from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from fp4dit_ao import _compat
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import release, weight_of
from fp4dit_ao.passes.device_placement import convert_tensors
from fp4dit_ao.passes.lowering import lower_in_place, lower_linear
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.schemes.graph_patterns import tensor_of
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.util.freed_memory import return_freed
from fp4dit_ao.util.mapped_files import MappedFiles


@torch.no_grad()
def convert_and_lower(
    prepared: GraphModule, device: torch.device | None = None, files: MappedFiles | None = None
) -> GraphModule:
    """``lower(convert_pt2e(prepared))``, equal in every bit, in little more memory than the result takes.

    Between the two, a graph would hold a byte of codes for every weight, twice what 4-bit weights take.

    Args:
        prepared: from ``prepare_pt2e``, calibrated and rounded; not to be used afterwards.
        device: where weights are rounded, one after the other; each where it is if None.
        files: where the result's tensors are; in memory if None.
    """
    for _, observer in weight_observers(prepared):
        observer.deferred = True
    converted: GraphModule = convert_pt2e(prepared, fold_quantize=False)
    _compat.forget_graphs()
    for node, observer in list(weight_observers(converted)):
        observer.deferred = False
        _lower_weight(converted, node, observer, device, files)
    tensors = {id(x): x for x in (*converted.parameters(), *converted.buffers())}
    lowered = lower_in_place(_compat.copied(converted, tensors))  # a copy may be called with eval()
    convert_tensors(lowered, partial(_own, files=files))
    return lowered


def _lower_weight(
    model: GraphModule, node: Node, observer: WeightObserver, device: torch.device | None, files: MappedFiles | None
) -> None:
    """Converts one weight observer, and lowers the linears that read its weight."""
    linears = [user for user in node.users if user.target is torch.ops.aten.linear.default]
    weight = weight_of(model, node)
    if device is not None and device != weight.device:
        _replace(model, node, weight.to(device))
        observer.to(device)
    observer.convert(model, node)
    sources = {linear.args[1] for linear in linears}
    for linear in linears:
        lower_linear(model, linear, weight.device, *([] if files is None else [files.keep]))
    for source in sources:
        assert isinstance(source, Node)
        _move(model, source, weight.device)  # of a linear that no scheme lowers
        release(model, source)
    observer.forget()  # codes, in graphs that share the observer
    return_freed(weight.numel())


def _replace(model: GraphModule, observer_node: Node, weight: Tensor) -> None:
    """Puts ``weight`` in the place of the one that an observer's node looks at."""
    source = observer_node.args[0]
    assert isinstance(source, Node)
    owner, _, leaf = str(source.target).rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))


def _move(model: GraphModule, node: Node, device: torch.device) -> None:
    """Moves the tensors that a node which is still read is computed from."""
    if node.users and node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensor_of(model, node).to(device))
    for source in node.all_input_nodes if node.users else ():
        _move(model, source, device)


def _own(x: Tensor, files: MappedFiles | None) -> Tensor:
    """A copy of what is not quantized, so that it is aligned as torch aligns it, and no file has to stay as it is."""
    if isinstance(x, LowBitWeight):
        return x
    kept = x if files is None else files.keep(x)
    return x.clone() if kept is x else kept
