"""``torch.export`` of a diffusion transformer into one aten graph, dynamic in batch, image size and text length."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.families import family_of
from fp4dit_ao.families.calls import Call, call_of
from fp4dit_ao.families.rewrites import REWRITES, methods_replaced
from fp4dit_ao.graph_capture.symbolic_numbers import numbers_kept_symbolic
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.passes.functional_writes import make_functional
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.sentences import first_line

_CONSTANTS = (type(None), bool, int, float, str)


def bind(model: nn.Module, sample: Mapping[str, object]) -> dict[str, object]:
    """Keyword arguments of ``model.forward`` from ``sample``: in the order of its signature, with defaults filled in, and
    in the form that graphs take.

    Raises:
        ValueError: ``sample`` is no mapping, has a key that ``forward`` does not take, lacks one that it needs, or has a value
            that no graph takes.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"a sample is a dict of the keyword arguments of {type(model).__name__}.forward, found {type(sample).__name__}; "
            f"its keys are among {', '.join(inspect.signature(model.forward).parameters)}"
        )
    signature = inspect.signature(model.forward)
    accepted = {n: p for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = sorted(set(sample) - set(accepted))
    missing = sorted(n for n, p in accepted.items() if p.default is p.empty and n not in sample)
    if unknown or missing:
        wrong = "; ".join(
            part
            for part in (
                f"unknown {', '.join(unknown)}" if unknown else "",
                f"missing {', '.join(missing)}" if missing else "",
            )
            if part
        )
        raise ValueError(
            f"the sample does not match {type(model).__name__}.forward: {wrong}; "
            f"give a dict with keys among {', '.join(accepted)}"
        )
    sample = call_of(type(model).__name__).adapt(dict(sample))
    bound = {name: sample.get(name, parameter.default) for name, parameter in accepted.items()}
    if "return_dict" in bound:
        bound["return_dict"] = False
    return bound


@plain_mode()
def capture(model: nn.Module, sample: Mapping[str, object]) -> GraphModule:
    """Exports ``model`` (non-strict) as a GraphModule with the call signature of ``model.forward``.

    Batch, spatial and sequence dimensions are dynamic (``Dim.AUTO``). The graph keeps only the dtypes and the constants
    (``None``, flags) of the sample. It returns a tuple, as with ``return_dict=False``.

    Args:
        model: any module whose tensors arrive as arguments, such as ``pipe.transformer``; put in eval mode.
        sample: keyword arguments of one forward call, as the pipeline makes it.

    Raises:
        ValueError: ``model`` is no module, a graph already, or the result of ``torch.compile``; the sample's keys do not match
            ``forward``, or the model cannot be captured with it.
    """
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        again = "a graph already: give it to prepare_pt2e, or capture the module that it was exported from"
        wrong = (
            again if isinstance(model, GraphModule) else "no module: give a torch.nn.Module, such as pipe.transformer"
        )
        raise ValueError(f"capture: {type(model).__name__} is {wrong}")
    family = family_of(model)
    leave_inference_mode(model).eval()
    kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().contiguous(), bind(model, sample))
    _check_leaves(model, kwargs)
    kwargs = _unspecialised(kwargs, call_of(type(model).__name__), family.shared)
    defaults = _defaults(model)
    # a whole number that is the argument's default, such as a patch size, is a constant
    shapes = {
        name: None if type(x) is int and x == defaults.get(name) else pytree.tree_map(_dynamic, x)
        for name, x in kwargs.items()
    }
    rewritten = methods_replaced(model, REWRITES, family.rewrites)
    with (
        torch.no_grad(),
        rewritten,
        numbers_kept_symbolic(model),
        _positions_computed(model),
        _tables_placed(model),
        _compat.distinct_sizes(),
        _compat.sizes_of_repeats(),
    ):
        exported = _exported(model, kwargs, shapes)
    if frozen := _compat.frozen_sizes(exported):
        warnings.warn(
            f"{type(model).__name__} computes a number from the sizes of its inputs, and its graph holds that of this sample "
            f"({'; '.join(frozen)}): use it at this size alone, or {_instead(model)}",
            stacklevel=3,  # beyond the decorator
        )
    graph = _compat.exported_graph(exported, {name: value for name, value in defaults.items() if name in kwargs})
    _drop_asserts(graph)
    make_functional(graph)
    return graph


def _exported(model: nn.Module, kwargs: dict[str, object], shapes: dict[str, object]) -> torch.export.ExportedProgram:
    """``torch.export`` of ``model``; raises ``ValueError`` with the remedy where it fails."""
    try:
        return torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be captured as a graph ({type(error).__name__}: {first_line(error)[:200]}); "
            f"{_instead(model)}"
        ) from error


def _instead(model: nn.Module) -> str:
    """Remedy for a model that cannot be captured: the module form is for models of diffusers, which have a config."""
    if hasattr(model, "config"):
        return "use the module form, which needs no graph: quantize_modules(model)"
    return (
        "see whether torch.export can take it at the sizes of one sample, and give prepare_pt2e "
        "torch.export.export(model, (), sample).module()"
    )


def _check_leaves(model: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Refuses arguments that are neither tensors and constants nor made of them."""
    for name, value in kwargs.items():
        other = next((x for x in pytree.tree_leaves(value) if not isinstance(x, (Tensor, *_CONSTANTS))), None)
        if other is not None:
            raise ValueError(
                f"{name} of {type(model).__name__} holds a {type(other).__name__}, which a graph cannot take; leave it out, or "
                f"{_instead(model)}"
            )


def _defaults(model: nn.Module) -> dict[str, object]:
    """Defaults of ``forward`` that are constants, or tuples of them; ``return_dict`` is False in graphs."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults: dict[str, object] = {p.name: p.default for p in parameters if _is_constant(p.default)}
    return defaults | ({"return_dict": False} if "return_dict" in defaults else {})


def _is_constant(x: object) -> bool:
    return isinstance(x, _CONSTANTS) or (isinstance(x, tuple) and all(map(_is_constant, x)))


def _dynamic(x: object) -> object:
    """Dynamic shape of one value of a sample for ``torch.export``: sizes and whole numbers vary, all else is
    constant."""
    if isinstance(x, Tensor):
        return dict.fromkeys(range(x.ndim), Dim.AUTO)
    return Dim.AUTO if type(x) is int else None


_POSITION_TABLES = (("pos_embed", "height"), ("pos_embedding", "sample_height"))
"""Attributes of diffusers' modules that cache positions of one image size (``PatchEmbed``, ``CogVideoXPatchEmbed``):
the table, and the size that it was made for."""


def _caches_positions(module: nn.Module) -> str | None:
    """Name of the attribute that holds the size of a module's cached position table; None if it has no such table."""
    for table, size in _POSITION_TABLES:
        learned = getattr(module, "use_learned_positional_embeddings", False)
        if hasattr(module, table) and hasattr(module, size) and not learned:
            return size
    return None


@contextlib.contextmanager
def _positions_computed(model: nn.Module) -> Iterator[None]:
    """Context in which cached position tables look stale, so that export records the code that computes them for any
    size."""
    cached = [
        (module, size, getattr(module, size)) for module in model.modules() if (size := _caches_positions(module))
    ]
    try:
        for module, size, _ in cached:
            setattr(module, size, -1)
        yield
    finally:
        for module, size, value in cached:
            setattr(module, size, value)


@contextlib.contextmanager
def _tables_placed(model: nn.Module) -> Iterator[None]:
    """Context in which tensors that modules keep beside their buffers, such as Qwen-Image's rotary tables, are where the
    parameters are: a graph that holds them can be prepared on one device alone."""
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    away = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor | list | tuple)
        and any(isinstance(x, Tensor) and x.device != device for x in pytree.tree_leaves(value))
    ]
    try:
        for module, name, value in away:
            vars(module)[name] = pytree.tree_map_only(Tensor, lambda x: x.to(device), value)
        yield
    finally:
        for module, name, value in away:
            vars(module)[name] = value


def _unspecialised(kwargs: dict[str, object], call: Call, shared: Sequence[str]) -> dict[str, object]:
    """Sample with a batch of at least two, since export takes a size of one for a constant. ``shared`` arguments
    stay."""
    tensors = [x for x in pytree.tree_leaves(kwargs) if isinstance(x, Tensor) and x.ndim]
    if not tensors or tensors[0].shape[0] != 1 or kwargs.get(call.one_a_row or "") is not None:
        return kwargs
    return {
        name: value
        if name in (*shared, *call.shared)
        else pytree.tree_map_only(Tensor, functools.partial(_twice, dim=call.batch.get(name, 0)), value)
        for name, value in kwargs.items()
    }


def _twice(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x], dim) if x.ndim > dim and x.shape[dim] == 1 else x


_ASSERTS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default)


def _drop_asserts(graph: GraphModule) -> None:
    """Removes export's run-time checks, which tie the graph to the device and the aspect ratio of the example."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTS:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
