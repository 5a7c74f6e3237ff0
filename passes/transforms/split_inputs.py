"""``linear(cat([a, b]))`` as ``linear(a) + linear(b)``, so that each part is quantized with scales of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.passes.transforms.annotated_linears import annotated_linears, crowded_modules, linear_name
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform, Record
from fp4dit_ao.passes.transforms.linear_groups import call
from fp4dit_ao.passes.transforms.scaled_linear import INPUT_SCALE, scaled_input

_ATEN = torch.ops.aten
_FEATURE_WISE = (
    _ATEN.layer_norm.default, _ATEN.rms_norm.default, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.dropout.default,
    _ATEN.clone.default, _ATEN.contiguous.default,
)  # fmt: skip
"""Operators whose output has at each feature what became of the input there."""
_PART = ".part"


def part_name(name: str, index: int) -> str:
    """Name of the ``index``-th part of a linear."""
    return f"{name}{_PART}{index}"


def whole_name(name: str) -> str:
    """Name of the linear that ``name`` is a part of; ``name`` itself if it is none."""
    whole, part, number = name.rpartition(_PART)
    return whole if part and number.isdigit() else name


class PartLinear(nn.Linear):
    """A part of a :class:`SplitLinear`, which may add the bias of the whole."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""
        return F.linear(x, self.weight, bias)


class SplitLinear(nn.Linear):
    """A linear whose input features are split: ``part0(x[..., :a]) + part1(x[..., a:]) + …``.

    An ``nn.Linear`` for whoever looks for one, such as a LoRA, which sees all of ``x``.

    Args:
        linear: that it replaces; its parameters are shared. The scale of a ``ScaledLinear`` is applied before splitting.
        sizes: input features of each part.
    """

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.sizes = list(sizes)
        self.register_parameter("bias", linear.bias)
        if isinstance(scale := getattr(linear, INPUT_SCALE, None), Tensor):
            stored = _compat.is_persistent(linear, INPUT_SCALE)
            self.register_buffer(INPUT_SCALE, scale, persistent=stored)
        for index, (size, weight) in enumerate(zip(sizes, linear.weight.split(self.sizes, 1), strict=True)):
            part = PartLinear(size, linear.out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight.detach(), requires_grad=False)
            self.add_module(part_name("", index).removeprefix("."), part)

    @property
    def parts(self) -> list[nn.Linear]:
        """The linears of the parts, in order."""
        return [child for child in self.children() if isinstance(child, nn.Linear)]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parts' weights as one float tensor ``(out_features, in_features)``, made anew at every call."""
        return torch.cat([_float(part.weight) for part in self.parts], 1)

    def list_whole_weight(self) -> None:
        """Let the state dict hold ``weight`` beside the parts: a placeholder of NaN that takes no memory.

        Diffusers' LoRA loader looks there for the shape of what a LoRA is to change. ``load_state_dict`` passes over it.
        """
        self.register_state_dict_post_hook(_add_placeholder)
        self.register_load_state_dict_pre_hook(_drop_placeholder)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""
        first, *others = zip(self.children(), scaled_input(self, x).split(self.sizes, -1), strict=True)
        total: Tensor = first[0](first[1], self.bias)
        for part, piece in others:
            total = total + part(piece)
        return total


def joins_or_is_part(node: Node) -> bool:
    """Whether a linear's node is, or may become, one of those that the parts of an input have; others cannot change it."""
    name = linear_name(node)
    return whole_name(name) != name or joined_features(node) is not None


def _add_placeholder(module: SplitLinear, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    weight = module.parts[0].weight
    nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device)
    state[f"{prefix}weight"] = nothing.expand(module.out_features, module.in_features)


def _drop_placeholder(module: SplitLinear, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    state.pop(f"{prefix}weight", None)


def _float(weight: Tensor) -> Tensor:
    values: Tensor = weight.dequantize() if isinstance(weight, TorchAOBaseTensor) else weight  # type: ignore[no-untyped-call]
    return values.detach()


def join_modules(model: nn.Module) -> None:
    """Put an ``nn.Linear`` in the place of every :class:`SplitLinear`, whose parts have float weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitLinear):
            whole = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight, scale = module.weight, getattr(module, INPUT_SCALE, None)
            whole.weight = nn.Parameter(weight if scale is None else weight * scale.to(weight), requires_grad=False)
            whole.bias = module.bias
            model.set_submodule(name, whole)


def joined_features(node: Node) -> list[int] | None:
    """How many features of each tensor a linear's input joins; None if it joins none, or sizes vary."""
    source = node.args[0]
    while isinstance(source, Node) and (source.target in _FEATURE_WISE or _is_scaled(source)):
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not _ATEN.cat.default or len(source.args) < 2:
        return None
    parts, dim = source.args[0], source.args[1]
    assert isinstance(parts, list | tuple) and isinstance(dim, int)
    rank = source.meta["val"].ndim
    sizes = [part.meta["val"].shape[-1] for part in parts]  # type: ignore[union-attr]
    features = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    fits = dim % rank == rank - 1 and len(sizes) > 1 and all(isinstance(size, int) for size in sizes)
    return sizes if fits and sum(sizes) == features else None


def _is_scaled(node: Node) -> bool:
    """Whether a node multiplies its first argument by a stored tensor, channel by channel."""
    if node.target is not _ATEN.mul.Tensor or not isinstance(node.args[0], Node):
        return False
    scale = node.args[1]
    return isinstance(scale, Node) and scale.op == "get_attr" and scale.meta["val"].ndim <= 1


def split_modules(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Put a :class:`SplitLinear` in the place of every named linear.

    Raises:
        ValueError: there is no such linear.
    """
    for name, parts in sizes.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or linear.in_features != sum(parts):
            raise ValueError(f"{type(model).__name__} has no linear {name} of {sum(parts)} input features")
        model.set_submodule(name, SplitLinear(linear, parts))


class SplitInputs(GraphTransform):
    """Splits linears whose input joins tensors along the features, so that each part has scales of its own.

    A part's weight is a parameter ``….skip_linear.part0.weight``, beside the bias; the whole weight goes. Source: the shortcut
    splitting of Q-Diffusion (arXiv 2302.04304, section 4.3.2).

    Args:
        quantizer: what it quantizes is split.
        wanted: says of a linear's node whether to split it if that is possible, in place of ``quantizer``; every one if both
            are None.

    Attributes:
        parts: input features of the parts of every linear that is split, by its name.
    """

    name: ClassVar[str] = "split_inputs"
    needs_data: ClassVar[bool] = False

    def __init__(self, quantizer: Quantizer | None = None, wanted: Callable[[Node], bool] | None = None):
        self.quantizer = quantizer
        self.wanted = wanted
        self.parts: dict[str, list[int]] = {}

    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]] = ()) -> None:
        """Find the linears to split; ``samples`` have no influence."""
        wanted = self.wanted
        if wanted is None and self.quantizer is not None:
            wanted = {linear.node for linear in annotated_linears(graph, self.quantizer)}.__contains__
        self.parts, left = {}, {"", *crowded_modules(graph)}
        for node in graph.graph.nodes:
            if node.target is _ATEN.linear.default and (wanted is None or wanted(node)):
                sizes = None if linear_name(node) in left else joined_features(node)
                if sizes is not None:
                    self.parts[linear_name(node)] = sizes

    @property
    def changes(self) -> bool:
        return bool(self.parts)

    def rewrite(self, graph: GraphModule) -> None:
        left = dict(self.parts)
        for node in list(graph.graph.nodes):
            name = linear_name(node) if node.target is _ATEN.linear.default else ""
            if name in self.parts:
                sizes = left.pop(name, self.parts[name])
                if sum(sizes) != node.args[1].meta["val"].shape[-1]:
                    raise ValueError(
                        f"linear {name} has {node.args[1].meta['val'].shape[-1]} input features, not {sizes}"
                    )
                _split(graph, node, sizes)
        if left:
            raise ValueError(f"the graph has no linear {next(iter(left))}, which was split; it is of another model")

    def apply_to_modules(self, model: nn.Module) -> None:
        split_modules(model, self.parts)

    def to_record(self) -> Record:
        return {"parts": {name: list(sizes) for name, sizes in self.parts.items()}}

    @classmethod
    def from_record(cls, record: Record) -> "SplitInputs":
        transform = cls()
        transform.parts = {str(name): [int(size) for size in sizes] for name, sizes in record["parts"].items()}
        return transform


def _split(model: GraphModule, node: Node, sizes: list[int]) -> None:
    source, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(source, Node) and isinstance(weight, Node)
    owner_name, _, leaf = str(weight.target).rpartition(".")
    owner = model.get_submodule(owner_name)
    whole: nn.Parameter = getattr(owner, leaf)
    total, start = None, 0
    with model.graph.inserting_before(node):
        for index, size in enumerate(sizes):
            stop = start + size
            part = nn.Module()
            part.register_parameter(leaf, nn.Parameter(whole[:, start:stop].detach().clone(), requires_grad=False))
            name = part_name(owner_name, index)
            model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], part)
            own = model.graph.get_attr(f"{name}.{leaf}")
            own.meta = dict(weight.meta) | {"val": weight.meta["val"][:, start:stop]}
            taken = call(
                model, node, _ATEN.slice.Tensor, (source, -1, start, stop), source.meta["val"][..., start:stop]
            )
            arguments = (taken, own) if bias is None or total is not None else (taken, own, bias)
            product = call(model, node, _ATEN.linear.default, arguments, node.meta["val"])
            total = (
                product if total is None else call(model, node, _ATEN.add.Tensor, (total, product), node.meta["val"])
            )
            start = stop
    assert total is not None
    node.replace_all_uses_with(total)
    model.graph.erase_node(node)
    if not weight.users:
        model.graph.erase_node(weight)
        if not any(n.op == "get_attr" and n.target == weight.target for n in model.graph.nodes):
            delattr(owner, leaf)
