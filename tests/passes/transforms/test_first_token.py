"""The first token: found where it is constant, kept exact, in the graph, in modules and in files; the function stays."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    FP4DiTQuantizer,
    QuantizedTransformer,
    capture,
    example_inputs,
    export_single_file,
    lower,
    quantizer_for,
    transform,
)
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.transforms.first_token import FirstToken
from tests.graphs import show
from tests.passes.transforms.layers import quantized, relative

CONFIG = replace(RECIPES["w4a6_e2m1"](), skip=(), group_size=32, attention=None)


class CrossAttention(nn.Module):
    """A query from the image, a key and a value from the text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(text), self.to_v(text)


def samples(count: int = 3, tokens: int = 5, constant: bool = True) -> list[dict[str, Tensor]]:
    """Of a text whose first token is twenty times as large as the others, and the same in all rows."""
    generator = torch.Generator().manual_seed(0)
    start = 20 * torch.randn(32, generator=generator)
    found = []
    for _ in range(count):
        x, text = torch.randn(2, 7, 32, generator=generator), torch.randn(2, tokens, 32, generator=generator)
        text[:, 0] = start if constant else 20 * text[:, 0]
        found.append({"x": x, "text": text})
    return found


def changed(model: nn.Module, data: list[dict[str, Tensor]], config: Any = CONFIG) -> tuple[Any, FirstToken]:
    method = FirstToken()
    return transform(capture(model, data[0]), data, [method], config, progress=False), method


def model() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention().eval()


@torch.no_grad()
def test_only_the_texts_linears_change_and_the_function_stays() -> None:
    float_model, data = model(), samples()
    graph, method = changed(float_model, data)
    lines = [line for line in show(graph).splitlines() if " = self." not in line]
    assert lines == [
        "linear = linear(x, to_q_weight, to_q_bias)",
        "slice_tensor = slice.Tensor(text, 1, 0, 1)",
        "slice_tensor_1 = slice.Tensor(text, 1, 1, 9223372036854775807)",
        "sub_tensor = sub.Tensor(slice_tensor, to_k_first_token)",
        "cat_default = cat([sub_tensor, slice_tensor_1], 1)",
        "linear_1 = linear(cat_default, to_k_weight, to_k_bias)",
        "slice_tensor_2 = slice.Tensor(linear_1, 1, 0, 1)",
        "slice_tensor_3 = slice.Tensor(linear_1, 1, 1, 9223372036854775807)",
        "add_tensor = add.Tensor(slice_tensor_2, to_k_first_token_output)",
        "cat_default_1 = cat([add_tensor, slice_tensor_3], 1)",
        "linear_2 = linear(cat_default, to_v_weight, to_v_bias)",
        "slice_tensor_4 = slice.Tensor(linear_2, 1, 0, 1)",
        "slice_tensor_5 = slice.Tensor(linear_2, 1, 1, 9223372036854775807)",
        "add_tensor_1 = add.Tensor(slice_tensor_4, to_v_first_token_output)",
        "cat_default_2 = cat([add_tensor_1, slice_tensor_5], 1)",
        "return (linear, cat_default_1, cat_default_2)",
    ]
    assert set(method.refused_loras()) == {"to_k", "to_v"}
    other = samples(4, tokens=9, constant=False)[3]  # another length, and a first token of its own
    for sample in (*data, other):
        for found, wanted in zip(graph(**sample), float_model(**sample), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    fresh = capture(float_model, data[0])
    FirstToken.from_record(method.to_record()).apply(fresh)
    for found, wanted in zip(fresh(**other), float_model(**other), strict=True):
        assert torch.equal(found, wanted), "changes nothing, until the stored token comes"


@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "w4a6_codebook", "nvfp4", "mxfp4", "w4a6_static", "int_w4a4"])
@torch.no_grad()
def test_the_token_is_exact_in_every_format_and_others_err_no_more(recipe: str) -> None:
    """Where all tokens share a static range, they err less without the large one among them; block scales of NVFP4 are E4M3
    numbers times the tensor's scale, which round anew when that changes."""
    most = {"w4a6_static": 0.7, "nvfp4": 1.1}.get(recipe, 1.0001)
    config = replace(RECIPES[recipe](), skip=(), attention=None)
    config = config if recipe in ("nvfp4", "mxfp4") else replace(config, group_size=32, pre_gelu_weight=None)
    float_model, data = model(), samples()
    plain = quantized(capture(float_model, data[0]), config, data[0])
    apart = quantized(changed(float_model, data, config)[0], config, data[0])
    wanted, found, before = (m(**data[1]) for m in (float_model, apart, plain))
    for index in (1, 2):
        assert (
            relative(found[index][:, 0], wanted[index][:, 0])
            < 1e-5
            < relative(before[index][:, 0], wanted[index][:, 0])
        )
        errors = [relative(y[index][:, 1:], wanted[index][:, 1:]) for y in (found, before)]
        assert errors[0] <= most * errors[1]
    assert torch.equal(found[0], before[0])


@torch.no_grad()
def test_modules_compute_what_the_graph_does() -> None:
    float_model, data = model(), samples()
    graph, method = changed(float_model, data)
    modules = copy.deepcopy(float_model)
    FirstToken.from_record(method.to_record()).apply_to_modules(modules)
    stored = dict(graph.named_buffers())
    for name, buffer in modules.named_buffers():
        own = {"to_v.first_token": "to_k.first_token"}.get(name, name)
        buffer.copy_(stored[own])
    assert method.shared_tensors() == {"to_v.first_token": "to_k.first_token"}
    assert all(torch.equal(a, b) for a, b in zip(modules(**data[1]), graph(**data[1]), strict=True))


def test_without_a_constant_token_or_a_second_prompt_nothing_changes() -> None:
    one_prompt = samples(1)[0]
    one_prompt["text"] = one_prompt["text"][:1].expand(2, -1, -1).clone()
    for data in (samples(constant=False), [one_prompt], samples(tokens=1)):
        graph, method = changed(model(), data)
        assert not method.changes
        assert "slice" not in show(graph)
    with pytest.raises(ValueError, match=r"needs a list of samples"):
        FirstToken(FP4DiTQuantizer().set_global(CONFIG)).fit(capture(model(), samples()[0]), [])
    with pytest.raises(ValueError, match="is empty"):
        FirstToken.from_record({"groups": [[]]})


@torch.no_grad()
def test_files_come_back_in_both_forms_with_the_same_bits(tmp_path: Path) -> None:
    float_model = small_model("PixArt-Σ")
    data = [example_inputs(float_model), example_inputs(float_model)]
    data[1]["encoder_hidden_states"] = data[1]["encoder_hidden_states"].flip(1).clone()
    for sample in data:
        sample["encoder_hidden_states"][:, 0] = 10 * torch.linspace(-1, 1, sample["encoder_hidden_states"].shape[-1])
    quantizer = quantizer_for(float_model, "w4a6")
    method = FirstToken()
    graph = transform(capture(float_model, data[0]), data, [method], quantizer, progress=False)
    names = {name.partition(".")[2].partition(".")[2] for group in method.groups for name in group.linears}
    assert names == {"attn2.to_k", "attn2.to_v"}
    lowered = lower(convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    description = sample_description.describe(bind(float_model, data[0]))
    whole = QuantizedTransformer(lowered, float_model, description, decisions)
    whole.save_pretrained(tmp_path / "saved")
    expected = whole(**data[1], return_dict=False)[0]
    for form in (load_graph(tmp_path / "saved"), load_modules(tmp_path / "saved")):
        assert torch.equal(form(**data[1], return_dict=False)[0], expected)
    with pytest.raises(ValueError, match=r"changed by the transform 'first_token'"):
        export_single_file(tmp_path / "saved", tmp_path / "one.safetensors")
