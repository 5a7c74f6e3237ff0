"""The one place that touches private torch and torchao API. Tested in tests/test_compat.py against every version we claim."""

import contextlib
import inspect
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as symbolic_config
from torch.fx.graph import _PyTreeCodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.printers import PythonPrinter


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


def input_names(graph: GraphModule) -> list[str]:
    """The parameter names of a captured graph's ``forward``."""
    codegen = graph.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        return [name for name in codegen.pytree_info.orig_args if name != "self"]
    return [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]


def varying_numbers(graph: GraphModule) -> set[str]:
    """The whole numbers among a captured graph's arguments that need not be those it was captured with."""
    return {n.name for n in graph.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), SymInt)}


def flat_inputs(graph: GraphModule, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a captured graph's placeholders, by node name, when it is called with ``**sample``.

    Raises:
        TypeError: ``sample`` does not fit the graph's signature.
        ValueError: an argument does not have the structure that was captured.
    """
    bound = inspect.signature(graph.forward).bind(**sample)
    bound.apply_defaults()
    values: list[Any] = list(bound.arguments.values())
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
    for part in parents:
        if not isinstance(getattr(module, part, None), nn.Module):
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
    inputs = (node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder")
    sizes: Iterator[Any] = (size for x in inputs if isinstance(x, Tensor) for size in x.shape)
    environment = next((size.node.shape_env for size in sizes if isinstance(size, SymInt)), None)
    if environment is None:
        return []
    simplified = (environment.simplify(guard.expr) for guard in environment.guards)
    equalities = (relation for relation in simplified if getattr(relation, "rel_op", "") == "==")
    return list(dict.fromkeys(map(_python, equalities)))


def size_text(size: int | SymInt) -> str:
    """A size as arithmetic in names, in Python's syntax if that has what it takes."""
    return _python(size.node.expr) if isinstance(size, SymInt) else str(size)


def _python(expression: Any) -> str:
    try:
        return str(PythonPrinter().doprint(expression))
    except (AssertionError, NotImplementedError):  # true division, say, which is no arithmetic of whole numbers
        return str(expression)


def fake_mode() -> FakeTensorMode:
    """Under it, operators compute shapes and types but no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a value in a graph that ``torch.compile`` is making: all that changes it is in the graph."""
    return isinstance(x, FunctionalTensor)


def size_hint(size: int | torch.SymInt) -> int | None:
    """What a size is while a graph is made: of a dynamic one, that of the example; None if it has none."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint if isinstance(hint, int) else None


def fake_like(x: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    """A tensor of ``x``'s shape that claims to be on the CPU and holds nothing."""
    return FakeTensor(mode, torch.empty_like(x, device="meta", dtype=dtype), torch.device("cpu"))


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the type in the arguments of ``Module.to``."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


def distinct_sizes() -> contextlib.AbstractContextManager[None]:
    """While compiling, sizes that happen to be equal (height and width, batch and heads) are not taken to always be so."""
    config: Any = symbolic_config
    patch: contextlib.AbstractContextManager[None] = config.patch(use_duck_shape=False)
    return patch


def sizes_of_repeats() -> contextlib.AbstractContextManager[Any]:
    """While exporting, ``repeat_interleave`` keeps sizes symbolic; torch 2.11's takes the one it repeats for a constant."""
    return contextlib.nullcontext() if torch.__version__ >= "2.12" else _ExpandedRepeats()


class _ExpandedRepeats(TorchFunctionMode):
    """``repeat_interleave`` by a whole number is recorded as the operators that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            found = self._arguments(*args, **(kwargs or {}))
            if isinstance(found["repeats"], int):
                return self._expanded(**found)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _arguments(input: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> dict[str, Any]:
        return {"x": input, "repeats": repeats, "dim": dim}

    @staticmethod
    def _expanded(x: Tensor, repeats: int, dim: int | None) -> Tensor:
        x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
        shape = [*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]]
        return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


_CPP_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
"""C++'s numbers of the types that our operators take as arguments (``c10::ScalarType``)."""
_FP8_HEADER = "#include <c10/util/Float8_e4m3fn.h>"


@contextlib.contextmanager
def types_in_packages() -> Iterator[None]:
    """While compiling a package: what older compilers write of types is what they then read.

    torch 2.11 writes type arguments in the numbers of export, and reads them as C++'s; it and 2.12 use FP8 without including
    its header.
    """
    with contextlib.ExitStack() as changes:
        if torch.__version__ < "2.12":
            changes.enter_context(_numbers_of_cpp())
        if torch.__version__ < "2.13":
            changes.enter_context(_header_of_fp8())
        yield


@contextlib.contextmanager
def _numbers_of_cpp() -> Iterator[None]:
    from torch._export.serde import serialize

    numbers: dict[torch.dtype, Any] = serialize._TORCH_TO_SERIALIZE_DTYPE
    own = dict(numbers)
    numbers.update(_CPP_TYPES)
    try:
        yield
    finally:
        numbers.update(own)


@contextlib.contextmanager
def _header_of_fp8() -> Iterator[None]:
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    include = wrapper.get_device_include_path
    wrapper.get_device_include_path = staticmethod(lambda device: f"{include(device)}\n{_FP8_HEADER}")
    try:
        yield
    finally:
        wrapper.get_device_include_path = staticmethod(include)


def mark_static(x: Tensor) -> None:
    """Let ``torch.compile`` take the sizes of ``x`` (and of the tensors that a subclass is made of) for constants."""
    torch._dynamo.mark_static(x)


def size_at(size: SymInt, sizes: Mapping[str, int], others: int) -> int:
    """A symbolic size where the named symbols have these ``sizes``, and all ``others`` that one."""
    expression = size.node.expr
    return int(expression.subs({symbol: sizes.get(str(symbol), others) for symbol in expression.free_symbols}))


def make_buffers_persistent(model: nn.Module, names: Container[str]) -> list[tuple[nn.Module, set[str]]]:
    """Bring the buffers of ``model`` that are among ``names`` into its state dict; returns those that were not, by module."""
    found = []
    for prefix, module in model.named_modules():
        own = {leaf for leaf in module._non_persistent_buffers_set if (f"{prefix}.{leaf}" if prefix else leaf) in names}
        module._non_persistent_buffers_set -= own
        found.append((module, own))
    return found


def make_buffers_transient(buffers: list[tuple[nn.Module, set[str]]]) -> None:
    """Undo :func:`make_buffers_persistent`."""
    for module, names in buffers:
        module._non_persistent_buffers_set |= names


def parts(cls: type[Any]) -> list[str]:
    """What a torchao tensor is made of, tensors and attributes, in the order of its constructor's arguments."""
    kinds = ("tensor_data", "tensor_attribute", "optional_tensor_data", "optional_tensor_attribute")
    return [name for kind in kinds for name in getattr(cls, f"{kind}_names", ())]


def int4_cpu_config(group_size: int) -> Any:
    """torchao's config of INT4 weights for CPUs, which 0.18 renamed."""
    from torchao.prototype.quantization.int4 import inference_workflow

    names = ("PrototypeInt4WeightOnlyConfig", "Int4WeightOnlyOpaqueTensorConfig")
    found = [config for name in names if (config := getattr(inference_workflow, name, None)) is not None]
    return found[0](group_size=group_size)
