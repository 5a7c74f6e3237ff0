"""``fp4dit-ao quantize`` takes every registered method by name, and the method quantizes a small transformer.

The command runs as it is, but for the pipeline: in its place stands a transformer of one block, quantized by what
``quantize_pipeline`` does with the arguments that it is given.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fp4dit_ao import FP4DiTQuantizer
from fp4dit_ao.calibration import SELECTIONS
from fp4dit_ao.cli import quantize as command
from fp4dit_ao.cli.app import app
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.diffusers_integration.pipeline_quantization import _Methods, _quantized
from fp4dit_ao.graph_capture.transforming import resolve_transforms
from fp4dit_ao.observers.scale_search import SEARCHES
from fp4dit_ao.passes.fine_tuning import FINE_TUNINGS
from fp4dit_ao.passes.mixed_precision import ALLOCATIONS
from fp4dit_ao.passes.reconstruction import ROUNDINGS
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.rounding import ClosedFormRounding
from fp4dit_ao.passes.reconstruction.scopes import SCOPES
from fp4dit_ao.passes.transforms.registry import TRANSFORMS
from tests.graphs import TinyDiT, tiny_sample

NEAREST = ["--rounding", "nearest"]
LEARNED = ["--rounding", "scale_aware", "--iters", "1"]
RECIPES = {"timestep_ranges": "w4a6_static"}
"""Recipes of methods that are not about w4a6_e2m1."""
CASES = [
    *((name, [*NEAREST, "--transform", name]) for name in TRANSFORMS),
    *(
        (name, ["--rounding", name, *([] if isinstance(rule, ClosedFormRounding) else ["--iters", "1"])])
        for name, rule in ROUNDINGS.items()
    ),
    *((name, [*LEARNED, "--objective", name]) for name in OBJECTIVES),
    *((name, [*LEARNED, "--scope", name]) for name in SCOPES),
    *((name, [*NEAREST, "--selection", name]) for name in SELECTIONS),
    *((name, [*NEAREST, "--recipe", "w4a6_auto", "--allocation", name]) for name in ALLOCATIONS),
    *((name, [*NEAREST, "--fine-tuning-steps", "1", "--fine-tuning", name]) for name in FINE_TUNINGS),
    *((name, [*NEAREST, "--weight-search", name]) for name in SEARCHES),
]


class Timed(TinyDiT):
    """With a timestep, as every diffusion transformer has."""

    def forward(self, hidden_states: Tensor, shift: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return super().forward(hidden_states, shift + timestep[:, None, None] * 1e-3)


def samples() -> list[dict[str, Any]]:
    return [tiny_sample(seed=seed) | {"timestep": torch.full((2,), 100.0 * seed)} for seed in (1, 2)]


def ends_at_the_transformer(pipe: object, recipe: str, **arguments: Any) -> Any:
    """``quantize_pipeline`` from the calibration samples on."""
    config = replace(QuantConfig.from_name(recipe), **arguments["fields"])
    methods = _Methods(
        resolve_transforms(arguments["transforms"]), arguments["allocation"], arguments["budget_bits"],
        arguments["reconstruction"], arguments["fine_tuning"], arguments["fine_tune"],
    )  # fmt: skip
    methods.check([config])
    SELECTIONS.find(arguments["selection"])
    data, quantizer = samples(), FP4DiTQuantizer().set_global(config)
    layers = 2 if methods.rounding.scope == "window" else 1
    graph, *_ = _quantized(Timed(layers=layers).eval(), data, quantizer, methods, None, None, None, False)
    with torch.no_grad():
        assert bool(torch.isfinite(graph(**data[0])[0]).all())
    assert any(hasattr(weight, "qdata") for weight in graph.parameters())
    reports = dict.fromkeys(("report", "fine_tuning_report", "combination_report"))
    return SimpleNamespace(transformer=SimpleNamespace(**reports), save_pretrained=lambda folder: None)


@pytest.mark.parametrize(("name", "options"), CASES, ids=["-".join(o[-2:]).strip("-") for _, o in CASES])
def test_every_method_is_taken(name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "quantize_pipeline", ends_at_the_transformer)
    monkeypatch.setattr(command, "sizes", lambda before, after: "")
    monkeypatch.setattr(command.named_models, "folder_of", lambda model: tmp_path)
    monkeypatch.setattr(command.named_models, "open_pipeline", lambda *a, **k: SimpleNamespace(transformer=None))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    recipe = [] if "--recipe" in options else ["--recipe", RECIPES.get(name, "w4a6_e2m1")]
    found = CliRunner().invoke(
        app, ["quantize", "tiny", "--out", f"{tmp_path}/q", "--prompts", f"{tmp_path}/prompts.txt", *recipe, *options]
    )
    assert found.exit_code == 0, found.output


def test_unknown_names_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    points = {
        "--transform": "transform", "--rounding": "rounding", "--objective": "objective", "--scope": "scope",
        "--selection": "sample selection", "--allocation": "allocation", "--fine-tuning": "fine-tuning",
    }  # fmt: skip
    for option, point in points.items():
        found = CliRunner().invoke(app, ["quantize", "no-such-model", "--out", f"{tmp_path}/q", option, "nonsense"])
        assert found.exit_code == 1
        assert f"unknown {point}" in f"{found.output}{found.exception}", option


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ([], "gptq"),
        (["--batch-size", "4"], "gptq"),
        (["--recipe", "best_5bit_1min"], "nearest"),
        (["--rounding", "adaround"], "scale_aware"),
        (["--iters", "3"], "scale_aware"),
        (["--patience", "3"], "scale_aware"),
        (["--bfloat16"], "scale_aware"),
        (["--compile-rounding"], "scale_aware"),
        (["--objective", "mse"], "scale_aware"),
        (["--scope", "layer"], "scale_aware"),
        (["--search-combination"], "scale_aware"),
    ],
    ids=str,
)
def test_what_is_said_of_rounding_decides_the_rule(
    options: list[str], rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passed_on(options, tmp_path, monkeypatch)["reconstruction"].rounding == rounding


def test_a_search_for_a_combination_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passed_on([*NEAREST, "--search-combination"], tmp_path, monkeypatch)
    assert seen["search_combination"] is True
    assert seen["checkpoint_dir"] == tmp_path / "q.unfinished" / "blocks"


def passed_on(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that ``quantize_pipeline`` gets."""
    seen: dict[str, Any] = {}

    def stop(pipe: object, recipe: str, **arguments: Any) -> None:
        seen.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantize_pipeline", stop)
    monkeypatch.setattr(command.named_models, "folder_of", lambda model: tmp_path)
    monkeypatch.setattr(command.named_models, "open_pipeline", lambda *a, **k: SimpleNamespace(device="cpu"))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    found = ["--prompts", f"{tmp_path}/prompts.txt", *options]
    CliRunner().invoke(app, ["quantize", "tiny", "--out", f"{tmp_path}/q", *found])
    return seen
