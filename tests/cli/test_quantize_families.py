"""``fp4dit-ao quantize`` and ``quantize_pipeline`` decide alike for every family of the table."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.fx import Graph, GraphModule
from typer.testing import CliRunner, Result

from benchmarks.families import SMALL, small_model
from fp4dit_ao import QuantConfig, quantize_pipeline
from fp4dit_ao.cli.app import app
from fp4dit_ao.diffusers_integration import named_models, pipeline_quantization
from fp4dit_ao.families import example_inputs
from fp4dit_ao.quantizer import FP4DiTQuantizer

SKIP = "*attn2*"
Decisions = dict[str, tuple[QuantConfig | None, str]]

model_of = functools.cache(small_model)


class Decided(Exception):
    """Carries the quantizer out of ``quantize_pipeline`` at the moment that it would annotate the graph."""

    def __init__(self, quantizer: FP4DiTQuantizer):
        self.quantizer = quantizer


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """``quantize_pipeline`` without calibration data and with an empty graph, stopped by :class:`Decided`."""

    def stop(graph: Any, quantizer: FP4DiTQuantizer) -> None:
        raise Decided(quantizer)

    monkeypatch.setattr(
        pipeline_quantization, "collect_samples", lambda pipe, *_, **__: [example_inputs(pipe.transformer)]
    )
    monkeypatch.setattr(pipeline_quantization, "capture", lambda *_: GraphModule({}, Graph()))
    monkeypatch.setattr(pipeline_quantization, "prepare_pt2e", stop)


def decisions(model: nn.Module, quantizer: FP4DiTQuantizer) -> Decisions:
    return {name: quantizer.config_for(name) for name, x in model.named_modules() if isinstance(x, nn.Linear)}


def pipeline(model: nn.Module) -> Any:
    return SimpleNamespace(transformer=model, components={"transformer": model})


def by_command_line(name: str, recipe: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> Decisions:
    """What ``fp4dit-ao quantize MODEL --recipe …`` decides for a small model of family ``name``."""
    pipe = pipeline(model_of(name))
    monkeypatch.setattr(named_models, "folder_of", lambda _: str(folder))
    monkeypatch.setattr(named_models, "open_pipeline", lambda *_, **__: pipe)
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\n")
    found = quantize("--out", folder / "out", "--recipe", recipe, "--skip", SKIP, "--prompts", prompts).exception
    assert isinstance(found, Decided), found
    return decisions(pipe.transformer, found.quantizer)


def quantize(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["quantize", "MODEL", *map(str, arguments)])


def by_api(name: str, recipe: str | QuantConfig) -> Decisions:
    pipe = pipeline(model_of(name))
    with pytest.raises(Decided) as found:
        quantize_pipeline(pipe, recipe, prompts=["a cat"], skip=[SKIP])
    return decisions(pipe.transformer, found.value.quantizer)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("recipe", ["w4a6", "w4a8_int8", "nvfp4"])
@pytest.mark.parametrize("name", list(SMALL))
def test_the_command_line_decides_as_the_api(name, recipe, tmp_path, monkeypatch) -> None:
    found = by_command_line(name, recipe, tmp_path, monkeypatch)
    assert found == by_api(name, recipe)
    kept = {linear for linear, (config, _) in found.items() if config is None}
    assert {linear for linear in found if "attn2" in linear} <= kept < found.keys()


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("name", "linear", "field", "expected"),
    [
        ("PixArt-Σ", "transformer_blocks.0.ff.net.0.proj", "weight", "e1m2"),
        ("PixArt-α", "transformer_blocks.0.ff.net.0.proj", "weight", "e2m1"),
        ("SD3", "transformer_blocks.0.norm1.linear", "activation", "int8"),
        ("SD3", "transformer_blocks.0.ff.net.0.proj", "pre_gelu_weight", None),
        ("Sana", "transformer_blocks.0.attn1.to_q", "indivisible", "divisor"),
    ],
)
def test_the_command_line_follows_the_family_table(name, linear, field, expected, tmp_path, monkeypatch) -> None:
    config, _ = by_command_line(name, "w4a6", tmp_path, monkeypatch)[linear]
    assert config is not None
    assert getattr(config, field) == expected


def test_the_sample_selection_reaches_the_calibration(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(named_models, "folder_of", lambda _: str(tmp_path))
    monkeypatch.setattr(named_models, "open_pipeline", lambda *_, **__: pipeline(model_of("DiT")))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    seen: list[str] = []

    def collect(pipe: Any, *_: Any, selection: str, **__: Any) -> None:
        seen.append(selection)
        raise RuntimeError("seen")

    monkeypatch.setattr(pipeline_quantization, "collect_samples", collect)
    options = ["--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt"]
    for chosen in ([], ["--selection", "density_diversity"]):
        assert "seen" in quantize(*options, *chosen).stderr
    assert seen == ["uniform", "density_diversity"]
    refused = quantize(*options, "--selection", "best")
    assert refused.exit_code == 1
    assert "unknown sample selection 'best'; choose one of uniform, density_diversity" in refused.stderr
    assert len(seen) == 2
