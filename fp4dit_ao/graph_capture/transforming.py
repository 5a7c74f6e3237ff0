"""``transform``: graph transforms, by name or as objects, fitted and applied one after the other."""

from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.config import QuantConfig, w4a6
from fp4dit_ao.passes.graph_stage import is_observed, is_quantized, require_graph
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.registry import TRANSFORMS, transform_named
from fp4dit_ao.quantizer import FP4DiTQuantizer
from fp4dit_ao.util.plain_mode import plain_mode


@plain_mode()
def transform(
    exported: GraphModule,
    samples: Sequence[Mapping[str, object]],
    transforms: Sequence[str | GraphTransform],
    quantizer: Quantizer | QuantConfig | None = None,
    progress: bool = True,
) -> GraphModule:
    """Fit and apply graph transforms, in order; the graph computes what it did before, and quantizes better.

    Args:
        exported: what :func:`fp4dit_ao.capture` returned; changed in place. The model that was captured is not.
        samples: calibration data, keyword arguments of ``forward``, one mapping a call; see :func:`fp4dit_ao.collect_samples`.
        transforms: names in ``passes.transforms.registry.TRANSFORMS``, with options if wanted
            (``"low_rank:rank=8"``), or objects.
        quantizer: the one that ``prepare_pt2e`` will be given, or a config for all linears: transforms that weigh errors
            measure them in its formats. ``w4a6()`` if None. A transform with a quantizer of its own uses that.
        progress: show progress bars with the time left.

    Returns:
        ``exported``.

    Raises:
        ValueError: no graph, or one that is prepared or quantized; an unknown name, no samples where they are needed, or
            samples that do not fit.
    """
    require_graph(exported, "transform", "the result of capture, or of torch.export.export(…).module()")
    if is_observed(exported) or is_quantized(exported):
        raise ValueError("transform: this graph is prepared or quantized already; transforms come before prepare_pt2e")
    if not isinstance(quantizer, Quantizer):
        quantizer = FP4DiTQuantizer().set_global(quantizer or w4a6())
    for found in resolve_transforms(transforms):
        given = found.quantizer
        found.quantizer, found.progress = given or quantizer, progress
        try:
            with torch.no_grad():
                found.fit(exported, samples)
                found.apply(exported)
        finally:
            found.quantizer = given
    return exported


def resolve_transforms(transforms: Sequence[str | GraphTransform]) -> list[GraphTransform]:
    """Transforms by name or as objects, as objects.

    Raises:
        ValueError: an unknown name or option, or something else than a sequence of names and objects.
    """
    if isinstance(transforms, str | GraphTransform):
        raise ValueError(f"transforms={transforms!r}; give a list, such as [{transforms!r}]")
    wrong = next((t for t in transforms if not isinstance(t, str | GraphTransform)), None)
    if wrong is not None:
        raise ValueError(
            f"a transform is a name ({', '.join(TRANSFORMS)}) or a GraphTransform object, found {type(wrong).__name__}"
        )
    return [transform_named(t) if isinstance(t, str) else t for t in transforms]
