"""Captured and exported graphs: calling convention, placeholders, sizes."""

import copy
import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch.utils._pytree as pytree
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.printers import PythonPrinter


class _Relation(Protocol):
    """An equality or inequality of SymPy, which has no type hints: the members that are used here."""

    @property
    def args(self) -> Sequence[Any]: ...

    def subs(self, values: Mapping[object, int]) -> object: ...


class SignatureCodeGen(_PyTreeCodeGen):
    """Generates ``forward`` with default values, so that a graph is called as the module it was captured from."""

    def __init__(self, inner: _PyTreeCodeGen, defaults: Mapping[str, object]):
        super().__init__(inner.pytree_info)
        self.defaults = dict(defaults)

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        text: str = super().gen_fn_def(*args, **kwargs)
        found = re.match(r"\s*def forward\((.*?)\)", text, re.DOTALL)
        assert found is not None
        names = [part.strip() for part in found[1].split(",") if part.strip()]
        parts, optional = [], False
        for name in names:
            optional = optional or name in self.defaults
            parts.append(f"{name}={self.defaults.get(name)!r}" if optional else name)
        return text[: found.start(1)] + ", ".join(parts) + text[found.end(1) :]


def exported_graph(exported: ExportedProgram, defaults: Mapping[str, object]) -> GraphModule:
    """The exported program as a plain GraphModule: no guards on the example's sizes, ``defaults`` in its signature."""
    module = exported.module(check_guards=False)
    codegen = module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    graph = GraphModule(module, module.graph)
    graph.graph.set_codegen(SignatureCodeGen(codegen, defaults))
    graph.meta.update(module.meta)
    graph.recompile()
    return graph


def copied(model: GraphModule, memo: dict[int, Any]) -> GraphModule:
    """``copy.deepcopy(model, memo)``, for graphs of fake tensors, too. torch warns of a class of its own that it copies.

    The copy of a fake tensor has that tensor's mode. ``deepcopy`` alone copies the mode with it, whose weak references to
    storages then end twice: the second time frees a storage that somebody has, and the process crashes once that one lets go.
    """
    modes = (mode for x in (*model.parameters(), *model.buffers()) for mode in _fake_modes(x))
    memo |= {id(mode): mode for mode in modes}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return copy.deepcopy(model, memo)


def _fake_modes(x: Tensor) -> Iterator[FakeTensorMode]:
    """The mode of a fake tensor, and those of the tensors that a subclass consists of."""
    if isinstance(x, FakeTensor):
        yield x.fake_mode
    elif is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from _fake_modes(getattr(x, name))


def copy_calling_convention(graph: Graph, source: Graph) -> None:
    """Give ``graph`` the signature, default values and output structure of ``source``."""
    graph.set_codegen(source._codegen)


def input_names(graph: GraphModule) -> list[str]:
    """The parameter names of a captured graph's ``forward``."""
    codegen = graph.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        return [name for name in codegen.pytree_info.orig_args if name != "self"]
    return [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]


def varying_numbers(graph: GraphModule) -> set[str]:
    """The whole numbers among a captured graph's arguments that need not be those it was captured with, as paths: ``rows``,
    ``shapes[0][1]``."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    codegen = graph.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return {name for name, value in zip(input_names(graph), values, strict=True) if _varies(value)}
    args, kwargs = pytree.tree_unflatten(values, codegen.pytree_info.in_spec)
    arguments = dict(zip(input_names(graph), args, strict=False)) | kwargs
    return {path for path, value in _leaves(arguments) if _varies(value)}


def _varies(value: object) -> bool:
    """Whether a placeholder's value is a number that no guard has made a constant."""
    return isinstance(value, SymInt) and not value.node.expr.is_number


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of what dicts, lists and tuples hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def flat_inputs(graph: GraphModule, sample: Mapping[str, object]) -> dict[str, Any]:
    """The values of a captured graph's placeholders, by node name, when it is called with ``**sample``.

    Raises:
        TypeError: ``sample`` does not fit the graph's signature.
        ValueError: an argument does not have the structure that was captured.
    """
    bound = inspect.signature(graph.forward).bind(**sample)
    bound.apply_defaults()
    values = list(bound.arguments.values())
    codegen = graph.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        names, spec = codegen.pytree_info.orig_args, codegen.pytree_info.in_spec
        names = [name for name in names if name != "self"]
        count = spec.child(0).num_children
        arguments = [bound.arguments[name] for name in names]
        keywords = dict(zip(spec.child(1).context, arguments[count:], strict=True))
        values = spec.flatten_up_to((tuple(arguments[:count]), keywords))
    placeholders = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, values, strict=True))


def create_buffer_node(model: GraphModule, path: str, value: Tensor) -> Node:
    """Register ``value`` as the buffer ``path`` (dotted, made unique) and a ``get_attr`` node for it.

    torchao's own helper puts every buffer on the root under a flattened name; next to the weight it replaces, a buffer
    keeps its fully qualified name.
    """
    *parents, leaf = path.split(".")
    module: nn.Module = model
    for index, part in enumerate(parents):
        found = getattr(module, part, None)
        if found is not None and not isinstance(found, nn.Module):  # a parameter that is no module's ``weight``
            parents, leaf = parents[:index], "_".join([*parents[index:], leaf])
            break
        if found is None:
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    name, copy = leaf, 1
    while hasattr(module, name):
        name, copy = f"{leaf}_{copy}", copy + 1
    module.register_buffer(name, value.detach())
    return model.graph.get_attr(".".join([*parents, name]))


def captured_sizes(graph: GraphModule) -> dict[str, list[int]]:
    """The shapes that a captured graph's tensor inputs had while it was captured, by placeholder name."""
    inputs = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    return {
        name: [int(size.node.hint) if isinstance(size, SymInt) else size for size in x.shape]
        for name, x in inputs.items()
        if isinstance(x, Tensor)
    }


def without_guards(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` without run-time checks of the example's proportions (an image that was not square, …)."""
    exported._guards_code = []
    return exported


def size_relations(exported: ExportedProgram) -> list[str]:
    """Equalities between the sizes of ``exported``'s inputs that its graph relies on, in the names that the sizes have there.

    Such as that of a mask's batch and the batch, which a view hides; see ``deploy.size_expressions``. Inequalities are left
    out: most are accidents of the example (an image that was not square, …).
    """
    return list(dict.fromkeys(map(_python, _equalities(_symbolic_sizes(exported)))))


def frozen_sizes(exported: ExportedProgram) -> list[str]:
    """Equalities of a number and what several sizes make, which hold for the example's sizes and not for all of them doubled.

    Such a graph holds a number that was computed from sizes (a logarithm of the number of tokens), and gives it to all. What
    one size alone is in is no such case: channels must be as many as the weights have. First dimensions are one size, the
    batch.
    """
    found = _symbolic_sizes(exported)
    example = {size.node.expr: int(size.node.hint) for _, size in found if size.node.expr.is_symbol}
    batch = {size.node.expr for axis, size in found if axis == 0}
    units = [batch, *({size} for size in example if size not in batch)]

    def holds(relation: _Relation, larger: Collection[object]) -> bool:
        return relation.subs({size: n * (1 + (size in larger)) for size, n in example.items()}) != False  # noqa: E712

    def is_frozen(relation: _Relation) -> bool:
        if not any(side.is_number for side in relation.args) or holds(relation, list(example)):
            return False
        return sum(not holds(relation, unit) for unit in units) > 1

    return [_python(relation) for relation in _equalities(found) if is_frozen(relation)]


def _symbolic_sizes(exported: ExportedProgram) -> list[tuple[int, SymInt]]:
    """Sizes of inputs that are no constants, each with its axis; -1 for a number that is an input itself."""
    inputs = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"]
    sizes = [pair for x in inputs for pair in (enumerate(x.shape) if isinstance(x, Tensor) else [(-1, x)])]
    return [(axis, size) for axis, size in sizes if isinstance(size, SymInt)]


def _equalities(sizes: Sequence[tuple[int, SymInt]]) -> list[_Relation]:
    if not sizes:
        return []
    environment = sizes[0][1].node.shape_env
    simplified = (environment.simplify(guard.expr) for guard in environment.guards)
    return [relation for relation in simplified if getattr(relation, "rel_op", "") == "=="]


def size_text(size: int | SymInt) -> str:
    """A size as arithmetic in names, in Python's syntax if that has what it takes."""
    return _python(size.node.expr) if isinstance(size, SymInt) else str(size)


def _python(expression: object) -> str:
    try:
        return str(PythonPrinter().doprint(expression))
    except (AssertionError, NotImplementedError):  # true division, say, which is no arithmetic of whole numbers
        return str(expression)


def size_at(size: SymInt, sizes: Mapping[str, int], others: int) -> int:
    """A symbolic size where the named symbols have these ``sizes``, and all ``others`` that one."""
    expression = size.node.expr
    return int(expression.subs({symbol: sizes.get(str(symbol), others) for symbol in expression.free_symbols}))


def is_view(target: object) -> bool:
    """Whether an operator's result may share memory with its arguments; True for what is no operator and may do anything."""
    schema = getattr(target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def symbol_values(graph: GraphModule, sample: Mapping[str, object]) -> dict[str, int]:
    """Values of the symbols in a captured graph's sizes when it is called with ``**sample``, by the symbol's name."""
    found: dict[str, int] = {}
    values = flat_inputs(graph, sample)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            symbolic, value = node.meta.get("val"), values[node.name]
            whole = isinstance(symbolic, Tensor)
            pairs: list[tuple[object, int]] = (
                list(zip(symbolic.shape, value.shape, strict=True)) if whole else [(symbolic, value)]
            )
            found |= {str(s.node.expr): int(n) for s, n in pairs if isinstance(s, SymInt) and s.node.expr.is_symbol}
    return found


def symbols_in(size: int | SymInt) -> set[str]:
    """The names of the symbols that a size depends on."""
    return {str(symbol) for symbol in size.node.expr.free_symbols} if isinstance(size, SymInt) else set()


def size_with(size: int | SymInt, values: Mapping[str, int]) -> int:
    """A size where symbols stand for ``values``; the captured one if some of its symbols have none."""
    if not isinstance(size, SymInt):
        return size
    return size_at(size, values, 0) if symbols_in(size) <= values.keys() else int(size.node.hint)
