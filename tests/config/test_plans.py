"""Plans: names that stand for a recipe with methods."""

from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.method_rows import BUDGETS, all_rows
from fp4dit_ao.cli.quantize import Methods
from fp4dit_ao.config import PLANS, RECIPES, Plan, QuantConfig, ReconstructionConfig, best
from fp4dit_ao.diffusers_integration.pipeline_quantization import quantize_pipeline
from fp4dit_ao.evaluation.fidelity import Fidelity
from fp4dit_ao.graph_capture.transforming import resolve_transforms
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.reconstruction import ROUNDINGS
from tests.tiny import CALL, tiny_pipeline

BITS = dict(zip((4, 5, 8), methods.BITS, strict=True))
MINUTES = {seconds // 60: seconds for seconds in methods.SECONDS}
"""Limits of bits a weight, and of seconds, as the table recommends methods for them."""


def test_every_plan_names_what_exists() -> None:
    assert set(PLANS) == {"best"} | {f"best_{bits}bit_{minutes}min" for bits in BITS for minutes in MINUTES}
    assert PLANS["best"] == best() == PLANS["best_4bit_10min"]
    for plan in PLANS.values():
        QuantConfig.from_name(plan.recipe)
        resolve_transforms(plan.transforms)
        ROUNDINGS.find(plan.rounding)
        assert plan.fine_tuning is None or FINE_TUNINGS.find(plan.fine_tuning)


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"minutes": 5}])
def test_other_limits_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="there are plans for"):
        best(**wrong)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("minutes", MINUTES)
def test_no_measured_method_is_shown_to_be_better_within_the_limits(bits: int, minutes: int) -> None:
    """No row that ``benchmarks.methods`` keeps and that fits has a PSNR higher by more than its 95 % interval."""
    rows = all_rows(BUDGETS)
    done = {key: row for key, row, _ in methods.read(list(rows), methods.RESULTS / "every_method")}

    def fits(row: Fidelity) -> bool:
        return float(row.notes["bits"]) <= BITS[bits] and float(row.notes["quantize, s"]) <= MINUTES[minutes]

    plan = best(bits, minutes)
    wanted = (RECIPES[plan.recipe](), plan.rounding, plan.transforms, plan.fine_tuning, "mse", "block")
    (key,) = [
        key
        for key, row in rows.items()
        if (row.config, row.rounding, row.transforms, row.fine_tuning, row.objective, row.scope) == wanted
    ]
    assert fits(done[key])
    for other, fidelity in done.items():
        if fits(fidelity) and other != "full":
            difference = (fidelity.psnr - done[key].psnr).mean(0)
            half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
            assert difference.mean() <= half, f"{other} is better than {key} by {difference.mean():.2f} dB"


@pytest.mark.parametrize(
    "given",
    [{"rounding": "gptq"}, {"transforms": ["smoothquant"]}, {"fine_tuning": "bias_correction"}, {"scope": "layer"},
     {"reconstruction": ReconstructionConfig("gptq")}, {"search_combination": True}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_methods_beside_a_plan_are_refused(given) -> None:
    with pytest.raises(ValueError, match=f"'best' brings its own methods .*leave out {next(iter(given))}"):
        quantize_pipeline(object(), "best", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a recipe with methods, for quantize_pipeline and `fp4dit-ao quantize`"):
        QuantConfig.from_name("best_8bit_1min")


def test_the_command_takes_a_plan_in_place_of_a_recipe() -> None:
    plan = best(5, 10)
    recipe, methods = Methods(selection="density_diversity").with_plan("best_5bit_10min")
    arguments = methods.arguments()
    assert recipe == plan.recipe and arguments["reconstruction"].rounding == plan.rounding
    assert (arguments["transforms"], arguments["fine_tuning"]) == (plan.transforms, plan.fine_tuning)
    assert arguments["selection"] == "density_diversity"
    assert Methods().with_plan("w4a6")[1].arguments()["reconstruction"].rounding == "gptq"
    refused = {"--rounding": Methods("gptq"), "--iters": Methods(iters=3), "--transform": Methods(transforms=["x"])}
    for option, methods in refused.items():
        with pytest.raises(ValueError, match=f"leave out {option}"):
            methods.with_plan("best")


def test_a_plan_gives_the_bits_of_what_it_stands_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = Plan("w4a6_codebook", "gptq", ("low_rank:rank=2,rows=32",))
    monkeypatch.setitem(PLANS, "best_test", plan)
    pipe = tiny_pipeline()
    common = {"prompts": ["a tiger"], "samples": 2, "progress": False, **CALL}
    quantize_pipeline(pipe, "best_test", **common).save_pretrained(tmp_path / "short")
    quantize_pipeline(pipe, plan.recipe, rounding=plan.rounding, transforms=plan.transforms, **common).save_pretrained(
        tmp_path / "long"
    )
    short, long = (
        next((tmp_path / name / "transformer").glob("*.safetensors")).read_bytes() for name in ("short", "long")
    )
    assert short == long and b"low_rank" in short
