"""Formats, groups and scale search of every linear: :class:`QuantConfig`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fp4dit_ao.config.plans import PLANS
from fp4dit_ao.config.scheme_rules import FLOAT_SCALES, rules_of
from fp4dit_ao.formats import CODEBOOK_SETS, parse
from fp4dit_ao.ops.block_scale import BLOCKS
from fp4dit_ao.ops.log_probability import MOST_BITS

HIGH_PRECISION = (
    "*pos_embed*", "*time_embed*", "*timestep*", "*time_text_embed*", "*text_embed*", "*context_embed*", "*x_embed*",
    "*caption_*", "*adaln_single*", "*time_extra_emb*", "norm_out*", "proj_out*", "*guidance_embed*",
)  # fmt: skip
"""Module names left in high precision by every recipe: patch, time and text embedders, final norm and projection."""

Fields = Mapping[str, Any]
"""Values of some fields of a :class:`QuantConfig`, by name, each of its field's type."""


@dataclass(frozen=True)
class QuantConfig:
    """How one linear (and the attention it feeds) is quantized. Formats are names that ``formats.parse`` reads.

    Raises:
        ValueError: an unknown format name, granularity, search or group size, or a field of the wrong type, in one sentence.
    """

    weight: str | None = "e2m1"
    """Format of linear weights, or a set of codebooks (``"nf4_groups"``); ``None`` leaves them as they are (and the layer
    unquantized)."""
    activation: str | None = "e2m3"
    """Format of linear inputs; ``None`` quantizes weights only."""
    group_size: int = 128
    """Consecutive inputs of one output channel that share a scale (``weight_granularity="group"``)."""
    pre_gelu_weight: str | None = "e3m0"
    """Format of the linear whose output reaches a GELU or SiLU gate; ``None`` uses ``weight``."""
    attention: str | None = "e2m3"
    """Format of the q, k and v that enter scaled-dot-product attention, per head and token; ``None`` leaves them."""
    attention_probabilities: Literal["log2_3", "log2_4", "log2_5", "log2_6"] | None = None
    """Attention's probabilities in codes of so many bits, powers of two of each prompt's largest (DGQ); in attention to a text
    its first key and that key's probability stay as they are. Computed by plain operators, in graphs alone."""
    weight_candidates: tuple[str, ...] = ()
    """If given, each linear takes the one with the smallest output error on calibration data, instead of ``weight``."""
    weight_granularity: Literal["group", "channel", "tensor"] = "group"
    weight_search: str = "absmax"
    """How a weight scale is found, a name in ``observers.scale_search.SEARCHES``: ``"absmax"``, from the largest magnitude (the
    paper), ``"mse"``, the scale with the least squared error, or ``"weighted_mse"``, with errors weighted by inputs."""
    activation_granularity: Literal["token", "tensor", "block"] = "token"
    """``"token"``: online, from each token's own absmax (the paper); ``"tensor"``: one static range, calibrated;
    ``"block"``: online, the hardware's block formats, for weights and inputs alike (``scale_dtype`` says which)."""
    activation_search: Literal["absmax", "lowbit_fp", "four_over_six"] = "absmax"
    """How the scale of an input is found: from the largest magnitude; for a static range (``"tensor"``) also of 111 parts of it
    the one with the least squared error on a reservoir of values; for NVFP4 blocks also online ``"four_over_six"``."""
    activation_candidates: tuple[str, ...] = ()
    """Formats, ``activation`` among them, of which each linear's input takes the one with the least squared error; with
    ``activation_search="lowbit_fp"`` alone. Where ``activation`` is another (a rule for some layers), that holds."""
    scale_dtype: Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"] = "float32"
    """Type of the stored weight scales. With blocks: ``"e8m0"``, a power of two for 32 elements (MX), or ``"e4m3"``, for 16
    elements and under one float32 for the tensor (NVFP4)."""
    indivisible: Literal["error", "divisor", "keep"] = "error"
    """When ``group_size`` does not divide a layer's inputs: refuse; take their largest divisor that is a multiple of 16, if
    there is one; or keep the layer in high precision."""
    split_inputs: bool = False
    """Whether a linear whose input joins tensors along the features becomes one linear for each of them, with scales of its
    own: in a long skip connection, ranges of the two differ."""
    skip: tuple[str, ...] = HIGH_PRECISION
    """Globs over module names that stay in high precision."""

    def __post_init__(self) -> None:
        for field in ("weight_candidates", "activation_candidates", "skip"):
            names = getattr(self, field)
            if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"QuantConfig: {field}={names!r}; it must be a tuple of names, such as {_EXAMPLES[field]}"
                )
            object.__setattr__(self, field, tuple(names))
        for field in (
            "weight",
            "activation",
            "pre_gelu_weight",
            "attention",
            "weight_candidates",
            "activation_candidates",
        ):
            value = getattr(self, field)
            for name in value if field.endswith("_candidates") else (value,):
                _check_format(field, name)
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"QuantConfig: {field}={getattr(self, field)!r}; choose one of {', '.join(map(str, allowed))}"
                )
        if not isinstance(self.group_size, int) or self.group_size < 2 or self.group_size % 2:
            raise ValueError(
                f"QuantConfig: group_size={self.group_size!r}; it must be an even whole number, such as 128"
            )
        self._check_static_search()
        rules_of(self).check(self)

    def _check_static_search(self) -> None:
        if self.activation_search == "four_over_six":
            if self.activation_granularity != "block" or self.scale_dtype != "e4m3":
                raise ValueError(
                    f"QuantConfig: activation_search='four_over_six' with activation_granularity="
                    f"{self.activation_granularity!r} and scale_dtype={self.scale_dtype!r}; it is for blocks of 16 with 'e4m3' "
                    "scales, recipe nvfp4"
                )
        elif self.activation_search != "absmax" and self.activation_granularity != "tensor":
            raise ValueError(
                f"QuantConfig: activation_search={self.activation_search!r} with activation_granularity="
                f"{self.activation_granularity!r}; scales that are found online are not searched for: choose 'tensor'"
            )
        if self.activation_candidates and (self.activation_search != "lowbit_fp" or self.activation is None):
            raise ValueError(
                f"QuantConfig: activation_candidates={self.activation_candidates} are chosen among by the search of static "
                "ranges; set activation_search='lowbit_fp', activation_granularity='tensor' and activation to one of them"
            )

    @property
    def probability_bits(self) -> int | None:
        """Bits of attention's probabilities; None where they are not quantized."""
        return None if self.attention_probabilities is None else int(self.attention_probabilities.rpartition("_")[2])

    @property
    def scheme(self) -> str:
        """Name of the quantization scheme that the fields choose, a key of ``fp4dit_ao.schemes.SCHEMES``."""
        return rules_of(self).name

    @property
    def weights_need_data(self) -> bool:
        """Whether formats or scales of weights depend on calibration."""
        return bool(self.weight_candidates) or self.weight_search in SEARCHES_ON_DATA

    @staticmethod
    def from_name(name: str) -> "QuantConfig":
        """The recipe of that name, one of :data:`RECIPES`.

        Raises:
            ValueError: no such recipe.
        """
        if name in PLANS:
            raise ValueError(
                f"{name!r} is a recipe with methods, for quantize_pipeline and `fp4dit-ao quantize`; its formats are those of "
                f"{PLANS[name].recipe!r}"
            )
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(sorted(RECIPES))}")
        return RECIPES[name]()

    def with_fields(self, values: Fields | None) -> "QuantConfig":
        """This config with other values of some fields, by name.

        Raises:
            ValueError: no such field, or a value that it cannot have.
        """
        names = [field.name for field in fields(QuantConfig)]
        values = values or {}
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"QuantConfig has no field {unknown[0]!r}; choose among {', '.join(names)}")
        return replace(self, **values)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "QuantConfig":
        """The inverse of ``dataclasses.asdict``, as read from JSON.

        Raises:
            ValueError: a field this version does not know.
        """
        if not isinstance(data, dict):
            raise ValueError(f"QuantConfig: expected a mapping of fields, found {type(data).__name__}")
        unknown = set(data) - {field.name for field in fields(QuantConfig)}
        if unknown:
            raise ValueError(
                f"QuantConfig does not know {', '.join(sorted(unknown))}; was it written by a newer version?"
            )
        return QuantConfig(**data)


def _check_format(field: str, name: str | None) -> None:
    try:
        _ = name is None or (field in _WEIGHTS and name in tuple(CODEBOOK_SETS)) or parse(name)
    except ValueError as error:
        raise ValueError(f"QuantConfig: {field}: {error}") from None


_WEIGHTS = ("weight", "pre_gelu_weight", "weight_candidates")
"""Fields that take sets of codebooks besides number formats."""

_EXAMPLES = {
    "weight_candidates": ("e2m1", "e3m0"),
    "activation_candidates": ("e2m3", "e3m2"),
    "skip": ("proj_out*",),
}

WEIGHT_SEARCHES = ["absmax", "mse", "weighted_mse", "lowbit_fp", "four_over_six", "outlier_cut"]
"""Names that ``weight_search`` takes; ``observers.scale_search.register_search`` adds to them."""
SEARCHES_ON_DATA = ["weighted_mse"]
"""Those among them that look at inputs; ``observers.scale_search.register_input_search`` adds to them."""

_CHOICES: dict[str, Sequence[str | None]] = {
    "weight_granularity": ("group", "channel", "tensor"),
    "weight_search": WEIGHT_SEARCHES,
    "activation_granularity": ("token", "tensor", "block"),
    "attention_probabilities": (None, *(f"log2_{bits}" for bits in range(3, MOST_BITS + 1))),
    "activation_search": ("absmax", "lowbit_fp", "four_over_six"),
    "scale_dtype": (*FLOAT_SCALES, *BLOCKS),
    "indivisible": ("error", "divisor", "keep"),
}


RECIPES: dict[str, Callable[[], QuantConfig]] = {}
"""Recipes by name, for the command line and :meth:`QuantConfig.from_name`; :mod:`fp4dit_ao.config.recipes` fills it."""
