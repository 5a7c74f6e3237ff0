"""Every transformer of diffusers that denoises, at small width, in the module form."""

import copy
from typing import Any

import pytest

from benchmarks.families import forms_of
from benchmarks.small_transformers import SMALL_TRANSFORMERS, small_transformer, transformer_classes, untried_classes
from benchmarks.small_transformers.entry import Small
from benchmarks.transformer_forms import Outcome, forms_table, measure, run, summary
from fp4dit_ao import quantize_modules
from fp4dit_ao.diffusers_integration.module_form import record_of
from fp4dit_ao.diffusers_integration.module_slots import quantized_linears
from fp4dit_ao.passes.transforms.split_inputs import whole_name
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from tests.conftest import ROOT


@pytest.mark.parametrize("kind", SMALL_TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:.*is no family that fp4dit_ao knows")
def test_its_blocks_run_on_low_bit_weights(kind: str) -> None:
    """Each weight is close to its own; the whole errs no more than formats of four and six bits make a few layers err."""
    model = small_transformer(kind)
    expected = run(model, kind, model)
    quantized: Any = quantize_modules(copy.deepcopy(model), "w4a6")  # type: ignore[arg-type]
    found = run(quantized, kind, model)
    assert found.isfinite().all()
    assert 0 < (found - expected).norm() < 0.35 * expected.norm()
    names = [name for name, _ in quantized_linears(record_of(quantized))]
    assert len(names) >= 6
    for name in map(whole_name, names):  # FLUX.1 and Hunyuan-DiT split linears whose input joins two tensors
        weight, low_bit = model.get_submodule(name).weight, quantized.get_submodule(name).weight
        low_bit = low_bit.dequantize() if isinstance(low_bit, LowBitWeight) else low_bit
        assert (low_bit - weight).norm() < 0.25 * weight.norm(), name  # E3M0: 0.19; of another layer: 1.4


def test_every_class_of_diffusers_has_a_small_model() -> None:
    """Of the pinned version; a later one may have more, which the table shows as untried."""
    import diffusers

    assert set(SMALL_TRANSFORMERS) <= set(transformer_classes())
    assert len(SMALL_TRANSFORMERS) == 73
    if diffusers.__version__ == "0.42.1":
        assert list(SMALL_TRANSFORMERS) == transformer_classes()


def test_ci_names_the_classes_of_a_later_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    known = untried_classes()
    assert known == [] or diffusers.__version__ != "0.42.1"
    monkeypatch.setattr(diffusers, "NewTransformer9DModel", object, raising=False)
    monkeypatch.setattr(diffusers, "NewTransformer9DPipeline", object, raising=False)
    assert untried_classes() == sorted([*known, "NewTransformer9DModel"])
    assert "python -m benchmarks.small_transformers" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_class_without_a_small_model_is_untried_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Small({"num_attention_heads": -1}, lambda random: {})
    monkeypatch.setitem(SMALL_TRANSFORMERS, "PriorTransformer", broken)
    rows = forms_of(["NewTransformer9DModel", "PriorTransformer", "Transformer2DModel"], {}, "w4a6", every=False)
    assert rows["NewTransformer9DModel"] == {}
    lines = forms_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["NewTransformer9DModel", "untried", "", "untried", "", ""]
    assert cells[3][:4] == ["PriorTransformer", "no", "", "untried"]
    assert cells[4][:2] == ["Transformer2DModel", "10 of 10"]
    said = summary(rows).splitlines()
    assert said[0] == "Module form: 1 of 3 classes, 1 untried."
    assert said[1].startswith("- PriorTransformer: ")
    assert said[2] == "Graph: 0 of 3 classes, 3 untried."


def count(found: Outcome) -> str:
    return f"{found.quantized} of {found.linears}"


def test_the_docs_list_every_class_with_what_the_module_form_quantizes() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    lines = page[page.index("| class ") :].partition("\n\n")[0].splitlines()[2:]
    said = {cells[0]: cells[1] for line in lines for cells in [[cell.strip() for cell in line.split("|")[1:-1]]]}
    assert list(said) == list(SMALL_TRANSFORMERS)
    for kind in ("QwenImageTransformer2DModel", "NucleusMoEImageTransformer2DModel", "HunyuanVideoTransformer3DModel"):
        assert said[kind] == count(measure(kind, "modules", "w4a6"))


@pytest.mark.parametrize(
    "kind", ["AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel", "WanAnimate2Transformer3DModel"]
)
def test_a_graph_that_cannot_be_is_refused_in_a_sentence(kind: str) -> None:
    failed = measure(kind, "graph", "w4a6").failed
    assert failed is not None
    assert failed.startswith(f"ValueError: {kind} ")
    assert failed.endswith("which a graph cannot; use the module form: quantize_modules(pipe.transformer)")
