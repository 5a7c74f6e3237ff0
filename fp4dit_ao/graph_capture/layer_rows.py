"""What each linear of a captured graph multiplies in one call, and how many rows of it: image tokens, text tokens, or one
vector an image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.passes.transforms.annotated_linears import linear_name


@dataclass(frozen=True)
class LayerRows:
    """Rows of every linear in one call of a model.

    Attributes:
        rows: by the name of the linear's module; all images of the batch together.
        tokens: image tokens of the call, all images of the batch together.
        source: the input that the image comes in, with its captured shape, such as ``"hidden_states 2×4×64×64"``.
        inputs: name of the value in the graph that each linear reads; q, k and v read the same.
    """

    rows: dict[str, int]
    tokens: int
    source: str
    inputs: dict[str, str]


def layer_rows(graph: GraphModule, description: sample_description.Description, tokens: int | None = None) -> LayerRows:
    """Rows of every linear when ``graph`` is called with the sample in ``description``, or with another image.

    Args:
        graph: a captured graph, lowered or not.
        description: of the sample; see ``sample_description.describe``.
        tokens: image tokens in place of the sample's. Rows that depend on the size of the image change in proportion;
            those of text, and of one vector an image, stay.
    """
    with torch.device("meta"):
        sample = sample_description.empty_like(description)
    values = _compat.symbol_values(graph, sample)
    image = _image_symbols(graph)
    found: dict[str, int] = {}
    inputs: dict[str, str] = {}
    of_image: set[str] = set()
    for node in graph.graph.nodes:
        name = linear_name(node) if node.target is torch.ops.aten.linear.default else ""
        if not name:
            continue
        shape = node.meta["val"].shape[:-1]
        rows = 1
        for size in shape:
            rows *= _compat.size_with(size, values)
        found.setdefault(name, rows)
        inputs.setdefault(name, str(node.args[0]))
        if any(_compat.symbols_in(size) & image for size in shape):
            of_image.add(name)
    captured = min((found[name] for name in of_image), default=max(found.values(), default=1))
    if tokens is not None:
        seen = of_image or {name for name, rows in found.items() if rows == captured}
        found |= {name: max(1, round(found[name] * tokens / captured)) for name in seen}
    name, x = next(sample_description.tensors(sample))
    source = f"{name} {'×'.join(map(str, x.shape))}"
    return LayerRows(found, captured if tokens is None else tokens, source, inputs)


def _image_symbols(graph: GraphModule) -> set[str]:
    """Symbols in the sizes of the first input, which holds the image, but for its batch."""
    inputs: list[object] = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    first = next(x for x in inputs if isinstance(x, Tensor))
    return set().union(*(_compat.symbols_in(size) for size in first.shape[1:]))
