"""Rules of each quantization scheme for a :class:`~fp4dit_ao.config.QuantConfig`: the half of a scheme that needs no tensors.

The other half, observers and tensor classes, is :mod:`fp4dit_ao.schemes`. It is apart because configs are made and checked
long before anything is quantized, and without importing torchao.
"""

from typing import TYPE_CHECKING, Protocol

from fp4dit_ao.formats import CODEBOOK_SETS
from fp4dit_ao.ops.block_scale import BLOCKS, ELEMENTS

if TYPE_CHECKING:
    from fp4dit_ao.config.quant_config import QuantConfig

BLOCK_SEARCHES = {"e8m0": ("absmax",), "e4m3": ("absmax", "four_over_six")}
"""Values of ``QuantConfig.weight_search`` by the type of block scales: powers of two are too far apart for the second."""
CODEBOOK_SEARCHES = ("mse", "weighted_mse")
"""Values of ``QuantConfig.weight_search`` with codebook groups."""
FLOAT_SCALES = ("float32", "float16", "bfloat16")
"""Types of scales that are plain floating-point numbers."""
GROUP_MULTIPLE = 4
"""Input features that kernels for codebook groups take at once."""


class SchemeRules(Protocol):
    """When a config means a scheme, and what it must look like then.

    Attributes:
        name: of the scheme, as ``fp4dit_ao.schemes.SCHEMES`` knows it.
    """

    name: str

    def claims(self, config: "QuantConfig") -> bool:
        """Whether the config means this scheme. Each field is a valid choice by itself; together they may contradict."""

    def check(self, config: "QuantConfig") -> None:
        """Checks a config that this scheme claims.

        Raises:
            ValueError: fields that contradict each other, in a sentence that begins with ``QuantConfig:`` and says which
                values go together.
        """


class BlockScaledRules:
    """Rules of the hardware's block formats: one element format for weights and inputs, one block length by type of scale."""

    name = "block_scaled"

    def claims(self, config: "QuantConfig") -> bool:
        return config.activation_granularity == "block" or config.scale_dtype in BLOCKS

    def check(self, config: "QuantConfig") -> None:
        if config.activation_granularity != "block" or BLOCKS.get(config.scale_dtype) != config.group_size:
            raise ValueError(
                f"QuantConfig: activation_granularity={config.activation_granularity!r} with scale_dtype="
                f"{config.scale_dtype!r} and group_size={config.group_size}; blocks have 'e8m0' scales and 32 elements, or "
                "'e4m3' and 16"
            )
        formats = ELEMENTS[config.scale_dtype]
        if config.activation not in formats or config.weight not in (None, config.activation):
            raise ValueError(
                f"QuantConfig: weight={config.weight!r} and activation={config.activation!r}; with {config.scale_dtype!r} "
                f"blocks both are the same, one of {', '.join(formats)}"
            )
        if config.weight_candidates or config.pre_gelu_weight not in (None, config.weight):
            raise ValueError(
                "QuantConfig: block formats are one for all layers; leave out weight_candidates and pre_gelu_weight"
            )
        searches = BLOCK_SEARCHES[config.scale_dtype]
        if config.weight_granularity != "group" or config.weight_search not in searches:
            raise ValueError(
                f"QuantConfig: weight_granularity={config.weight_granularity!r} and weight_search={config.weight_search!r}; "
                f"blocks with {config.scale_dtype!r} scales have 'group' and {' or '.join(map(repr, searches))}"
            )


class CodebookGroupsRules:
    """Rules of codebook groups: weights are named after sets of codebooks, whose codebooks and row scales are searched for."""

    name = "codebook_groups"

    def claims(self, config: "QuantConfig") -> bool:
        return any(name in CODEBOOK_SETS for name in (config.weight, *config.weight_candidates))

    def check(self, config: "QuantConfig") -> None:
        others = [name for name in config.weight_candidates if name not in CODEBOOK_SETS]
        if others or config.weight not in (None, *CODEBOOK_SETS):
            raise ValueError(
                f"QuantConfig: weight={config.weight!r} and weight_candidates={config.weight_candidates}; sets of codebooks "
                f"({', '.join(CODEBOOK_SETS)}) do not mix with number formats in one layer"
            )
        searched = config.weight_search in CODEBOOK_SEARCHES
        if config.weight_granularity != "group" or not searched or config.scale_dtype != "float32":
            raise ValueError(
                "QuantConfig: codebook groups have weight_granularity='group', weight_search='mse' or 'weighted_mse', and "
                "scale_dtype='float32'"
            )
        if config.group_size % GROUP_MULTIPLE:
            raise ValueError(
                f"QuantConfig: group_size={config.group_size}; codebook groups have a multiple of {GROUP_MULTIPLE}, such as 128"
            )


class GroupedRules:
    """Rules of levels times a float scale per group, channel or tensor: any config that no other scheme claims."""

    name = "grouped"

    def claims(self, config: "QuantConfig") -> bool:
        return True

    def check(self, config: "QuantConfig") -> None:
        formats = {name for name in (config.weight, config.pre_gelu_weight, *config.weight_candidates) if name}
        others = ", ".join(sorted(formats - {"e2m1"}))
        if config.weight_search == "four_over_six" and others:
            raise ValueError(
                f"QuantConfig: weight_search='four_over_six' with {others}; only e2m1 has nothing between 4 and 6: choose "
                "it for all weights (pre_gelu_weight=None), or the search 'mse'"
            )


BLOCK_SCALED, CODEBOOK_GROUPS, GROUPED = BlockScaledRules(), CodebookGroupsRules(), GroupedRules()

RULES: list[SchemeRules] = [BLOCK_SCALED, CODEBOOK_GROUPS, GROUPED]
"""Rules of all schemes. The first that claims a config has it; the last claims any. ``schemes.register_scheme`` adds one."""


def rules_of(config: "QuantConfig") -> SchemeRules:
    """The rules of the scheme that ``config`` means."""
    return next(rules for rules in RULES if rules.claims(config))
