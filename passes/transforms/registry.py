"""The table of graph transforms, and transforms from their records."""

from collections.abc import Iterable
from inspect import signature

from torch.fx import GraphModule

from fp4dit_ao.passes.transforms.adaptive_rotation import AdaptiveRotation
from fp4dit_ao.passes.transforms.first_token import FirstToken
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform, Record, records_of
from fp4dit_ao.passes.transforms.hadamard import Hadamard
from fp4dit_ao.passes.transforms.low_rank import LowRank
from fp4dit_ao.passes.transforms.momentum_balance import MomentumBalance
from fp4dit_ao.passes.transforms.outlier_groups import OutlierGroups
from fp4dit_ao.passes.transforms.outlier_scaling import OutlierScaling
from fp4dit_ao.passes.transforms.principal_components import PrincipalComponents
from fp4dit_ao.passes.transforms.regular_hadamard import RegularHadamard
from fp4dit_ao.passes.transforms.salience_balance import SalienceBalance
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs
from fp4dit_ao.passes.transforms.timestep_ranges import TimestepRanges
from fp4dit_ao.passes.transforms.weight_equalization import WeightEqualization
from fp4dit_ao.util.registry import Registry

TRANSFORMS: Registry[type[GraphTransform]] = Registry("transform")
"""By the name that ``transform``, ``quantize_pipeline`` and the command line take."""

TRANSFORMS.register(
    SmoothQuant.name,
    SmoothQuant,
    summary="Divides channels of linears' inputs, and multiplies their weights, by the factors that err least at the output.",
    source="SmoothQuant, arXiv 2211.10438, eq. 4; grid of SVDQuant, arXiv 2411.05007",
    cost="one pass over the samples, then 40 trial quantizations of each linear",
)
TRANSFORMS.register(
    SalienceBalance.name,
    SalienceBalance,
    summary="The same with one vector of factors, from timesteps where inputs and weights are large in different channels.",
    source="PTQ4DiT, arXiv 2405.16005",
    cost="one pass over the samples, then 2 trial quantizations of each linear",
)
TRANSFORMS.register(
    MomentumBalance.name,
    MomentumBalance,
    summary="The same with one vector of factors, from a moving average of inputs' ranges over the samples.",
    source="ViDiT-Q, arXiv 2406.02540",
    cost="one pass over the samples, then 2 trial quantizations of each linear",
)
TRANSFORMS.register(
    OutlierScaling.name,
    OutlierScaling,
    summary="The same with factors for the channels that have outliers alone, found coarse to fine.",
    source="CBQ, arXiv 2312.07950, its pre-processing of activations",
    cost="one pass over the samples, then 2 trial quantizations of each linear",
)
TRANSFORMS.register(
    SplitInputs.name,
    SplitInputs,
    summary="Splits a linear whose input joins tensors into one linear for each, with scales of its own.",
    source="Q-Diffusion, arXiv 2302.04304, sec. 4.3.2",
    cost="one more linear a joint",
)
TRANSFORMS.register(
    Hadamard.name,
    Hadamard,
    summary="Mixes blocks of linears' input channels by Hadamard matrices, where that errs less at the output.",
    source="QuaRot, arXiv 2404.00456",
    cost="one pass over the samples; a product with a matrix of 128 columns before each linear",
)
TRANSFORMS.register(
    RegularHadamard.name,
    RegularHadamard,
    summary="The same with matrices of equal row and column sums, which spread outliers of channels and of whole rows.",
    source="ConvRot, arXiv 2512.03673",
    cost="one pass over the samples; a product with a matrix of at most 256 columns before each linear",
)
TRANSFORMS.register(
    AdaptiveRotation.name,
    AdaptiveRotation,
    summary="Mixes channels as hadamard does, and where outliers are massive by two fitted rotations.",
    source="LRQ-DiT, arXiv 2508.03485; the fitted rotations: DuQuant, arXiv 2406.01721",
    cost="one pass over the samples; as hadamard, and where outliers are massive twice that and a gather",
)
TRANSFORMS.register(
    LowRank.name,
    LowRank,
    summary="Takes a part of rank 32 out of weights, which stays in high precision, and quantizes the rest.",
    source="SVDQuant, arXiv 2411.05007; the iteration: its code",
    cost="one pass over the samples, then a few trial quantizations of each linear; two small products beside each linear",
)
TRANSFORMS.register(
    PrincipalComponents.name,
    PrincipalComponents,
    summary="Keeps an eighth of the directions of linears' inputs in high precision, and quantizes the rest.",
    source="DiRotQ, arXiv 2605.16732",
    cost="one pass over the samples; three products with a matrix of an eighth of the channels beside each linear",
)
TRANSFORMS.register(
    WeightEqualization.name,
    WeightEqualization,
    summary="Gives value and output projections equal ranges in every channel that one writes and the other reads.",
    source="arXiv 1906.04721; minifloats: arXiv 2311.12359",
    cost="none; no data",
)
TRANSFORMS.register(
    TimestepRanges.name,
    TimestepRanges,
    summary="Gives static ranges of linears' inputs another value at every timestep of the calibration.",
    source="TFMQ-DM, arXiv 2311.16503",
    cost="one pass over the samples; a division before each linear and a product behind it",
)
TRANSFORMS.register(
    OutlierGroups.name,
    OutlierGroups,
    summary="Sorts linears' input channels by size, so that like ones share a scale, where that errs less at the output.",
    source="DGQ, arXiv 2501.04304",
    cost="one pass over the samples, then 4 trial quantizations of each linear; a gather before each linear",
)
TRANSFORMS.register(
    FirstToken.name,
    FirstToken,
    summary="Keeps what linears make of the text's first token in high precision, where that token is the same in all samples.",
    source="MixDQ, arXiv 2405.17873, section 4.1",
    cost="one pass over the samples; a difference and a sum of one token beside each linear that reads text",
)


_SAID = {bool: "true or false", int: "a whole number", float: "a number"}
"""Values of an option, by its type, in words."""


def transform_named(text: str) -> GraphTransform:
    """A transform by its name, with its defaults or with options: ``"low_rank"``, ``"low_rank:rank=8,rows=1024"``.

    Raises:
        ValueError: an unknown name or option, or a value that the transform does not take.
    """
    name, _, given = text.partition(":")
    made = TRANSFORMS.find(name)
    types = {
        option.name: type(option.default)
        for option in signature(made).parameters.values()
        if isinstance(option.default, bool | int | float)
    }
    options = {}
    for part in filter(None, given.split(",")):
        option, _, value = part.partition("=")
        if option not in types:
            raise ValueError(
                f"{text!r}: transform {name!r} has no option {option!r}; it has {', '.join(types) or 'none'}"
            )
        try:
            options[option] = (
                {"true": True, "false": False}[value.lower()] if types[option] is bool else types[option](value)
            )
        except (ValueError, KeyError):
            raise ValueError(f"{text!r}: {option} takes {_SAID[types[option]]}, found {value!r}") from None
    return made(**options)


def from_records(records: Iterable[Record]) -> list[GraphTransform]:
    """The transforms that records describe, in order.

    Raises:
        ValueError, LookupError, TypeError: a record of an unknown transform, or a damaged one.
    """
    return [
        TRANSFORMS.find(record["name"]).from_record({k: v for k, v in record.items() if k != "name"})
        for record in records
    ]


def applied_transforms(graph: GraphModule) -> list[GraphTransform]:
    """The transforms that were applied to ``graph``, as they come from their records."""
    return from_records(records_of(graph))
