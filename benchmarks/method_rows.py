"""Rows of the table of methods: number formats, every registered method alone, and combinations, for each budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp4dit_ao import QuantConfig
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.reconstruction import OBJECTIVES, ROUNDINGS, SCOPES
from fp4dit_ao.passes.transforms.registry import TRANSFORMS

BUDGETS = ("w4a8", "w4a6", "w4a4")
BLOCK_RECIPES = ("nvfp4", "mxfp4")
BLOCK_TRANSFORMS = (("low_rank:rank=8",), ("smoothquant", "low_rank"))
"""Transforms before GPTQ with these recipes."""
LEARNED = "scale_aware"


@dataclass(frozen=True)
class Row:
    """One row of the table. ``base`` is the key of the row with nearest rounding in the same format."""

    label: str
    config: QuantConfig | None
    rounding: str = "nearest"
    objective: str = "mse"
    scope: str = "block"
    transforms: tuple[str, ...] = ()
    fine_tuning: str | None = None
    base: str | None = None


def rows_of(budget: str) -> dict[str, Row]:
    """Rows of a budget by key: formats, then every registered method alone with codebook groups, then combinations."""
    codebook = RECIPES[f"{budget}_codebook"]()
    e2m1 = replace(RECIPES[budget](), weight="e2m1", pre_gelu_weight=None)
    base = f"{budget}-nearest"
    found = {
        base: Row("codebook groups, nearest", codebook),
        f"{budget}-e2m1": Row("E2M1, nearest", e2m1),
        f"{budget}-int": Row("INT4, nearest", RECIPES[f"int_{budget}"]()),
    }

    def add(name: str, label: str, **options: Any) -> None:
        found[f"{budget}-{name}"] = Row(f"codebook groups, {label}", codebook, base=base, **options)

    for name in ROUNDINGS:
        if name != "nearest":
            add(name, name, rounding=name)
    for name in TRANSFORMS:
        add(name, f"{name}, nearest", transforms=(name,))
    for name in OBJECTIVES:
        if name != "mse":
            add(name, f"{LEARNED}, {name}", rounding=LEARNED, objective=name)
    for name in SCOPES:
        if name != "block":
            add(name, f"{LEARNED}, by {name}", rounding=LEARNED, scope=name)
    for name in FINE_TUNINGS:
        if name != "scales":  # those of codebook groups are no free numbers
            add(name, f"nearest, fine-tuning {name}", fine_tuning=name)
    for transforms in (
        ("smoothquant",),
        ("hadamard",),
        ("low_rank",),
        ("smoothquant", "low_rank"),
        ("low_rank:rank=8",),
    ):
        names = "+".join((*transforms, "gptq"))
        add(_key(names), f"{', '.join(transforms)}, gptq", rounding="gptq", transforms=transforms)
    for name in ("gptq", LEARNED):
        found[f"{budget}-e2m1-{name}"] = Row(f"E2M1, {name}", e2m1, name, base=f"{budget}-e2m1")
    for name in ("nearest", "gptq"):
        found[f"{budget}-e2m1-{name}+scales"] = Row(
            f"E2M1, {name}, fine-tuning scales", e2m1, name, fine_tuning="scales", base=f"{budget}-e2m1"
        )
    if budget == "w4a8":
        found[f"{budget}-w8a8"] = Row("W8A8, nearest", RECIPES["w8a8"]())
        found[f"{budget}-w8a8-gptq"] = Row("W8A8, gptq", RECIPES["w8a8"](), "gptq", base=f"{budget}-w8a8")
    if budget == "w4a4":
        for recipe in BLOCK_RECIPES:
            blocks, key = RECIPES[recipe](), f"{budget}-{recipe}"
            found[key] = Row(f"{recipe.upper()}, nearest", blocks)
            for transforms in ((), *BLOCK_TRANSFORMS):
                names, label = "+".join((*transforms, "gptq")), ", ".join((recipe.upper(), *transforms, "gptq"))
                found[f"{key}-{_key(names)}"] = Row(label, blocks, "gptq", transforms=transforms, base=key)
    return found


def _key(names: str) -> str:
    return names.replace(":rank=", "_")


def all_rows(budgets: Sequence[str]) -> dict[str, Row]:
    """The original, and the rows of each budget."""
    return {"full": Row("full precision", None)} | {
        key: row for budget in budgets for key, row in rows_of(budget).items()
    }
