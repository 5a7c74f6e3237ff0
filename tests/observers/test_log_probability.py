"""Attention's probabilities as powers of two: the operator by NumPy, the graph by hand, the start token apart, refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.layer_summary import layer_summaries, unit_of
from fp4dit_ao.diffusers_integration.module_slots import check_online
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.ops import choose_scale, fake_quantize
from fp4dit_ao.ops.log_probability import log2_round
from fp4dit_ao.quantizer import Decision

CONFIG = replace(
    RECIPES["w4a6_e2m1"](), skip=(), group_size=32, attention=None, attention_probabilities="log2_4"
)  # fmt: skip


class TwoAttentions(nn.Module):
    """Attention of the image to itself, then to the text."""

    def __init__(self, masked: str = "none"):
        super().__init__()
        self.masked = masked
        self.inside, self.across = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = x + self.inside(x, x, None)
        given = {"none": None, "bool": mask[:, None, None] > 0, "float": (mask[:, None, None] - 1) * 1e4}[self.masked]
        return x + self.across(x, text, given)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.heads(x, text)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor, text: Tensor) -> list[Tensor]:
        return [
            to(z).unflatten(-1, (2, 16)).transpose(1, 2)
            for to, z in ((self.to_q, x), (self.to_k, text), (self.to_v, text))
        ]


def sample(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, 7)
    mask[1:, 5:] = 0
    x, text = torch.randn(batch, 11, 32, generator=generator), torch.randn(batch, 7, 32, generator=generator)
    return {"x": x.to(dtype), "text": (3 * text).to(dtype), "mask": mask.to(dtype)}


def model(masked: str = "none", dtype: torch.dtype = torch.float32) -> TwoAttentions:
    torch.manual_seed(0)
    found = TwoAttentions(masked).eval().to(dtype)
    for parameter in found.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return found


def by_hand(p: np.ndarray, bits: int, first: bool) -> np.ndarray:
    """In float64, prompt by prompt."""
    found = p.astype(np.float64).copy()
    for row in found:
        part = row[..., 1:] if first else row
        largest = part.max()
        with np.errstate(divide="ignore"):
            code = np.clip(np.round(-np.log2(part / largest)), 0, 2**bits - 1)
        part[...] = largest * 2.0**-code
    return found


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("first", [False, True])
def test_probabilities_are_powers_of_two_of_the_prompts_largest(bits: int, first: bool) -> None:
    logits = 4 * torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    p[0, 0, 0, 3] = 0
    found = log2_round(p, bits, first)
    np.testing.assert_allclose(found.numpy(), by_hand(p.numpy(), bits, first), rtol=1e-6)
    assert not first or torch.equal(found[..., 0], p[..., 0])
    alone = log2_round(p[1:2], bits, first)
    assert torch.equal(alone, found[1:2]), "other prompts in the batch change nothing"
    assert log2_round(p.bfloat16(), bits, first).dtype == torch.bfloat16


def prepared(config: QuantConfig, masked: str = "none", dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    float_model, data = model(masked, dtype), sample(2, dtype)
    quantizer = FP4DiTQuantizer().set_global(config)
    return prepare_pt2e(capture(float_model, data), quantizer), float_model, quantizer


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@torch.no_grad()
def test_the_products_are_attention(masked: str) -> None:
    graph, float_model, _ = prepared(CONFIG, masked)
    set_fake_quantize(graph, False, False, paused=True)
    for batch in (2, 3):
        torch.testing.assert_close(graph(**sample(batch)), float_model(**sample(batch)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", [None, "e2m3"])
@torch.no_grad()
def test_the_converted_graph_and_the_lowered_one_round_probabilities(attention: str | None) -> None:
    """Alone, and with q, k and v in 6 bits, of which the first key to a text is none."""
    config = replace(CONFIG, attention=attention, weight="int8", activation=None)
    graph, float_model, quantizer = prepared(config)
    graph(**sample())
    converted = convert_pt2e(graph, fold_quantize=False)
    kept = {name: p.detach() for name, p in lower(converted).named_parameters()}
    for name, weight in kept.items():
        if hasattr(weight, "dequantize"):
            float_model.get_parameter(name).data.copy_(weight.dequantize())

    def rounded(x: Tensor) -> Tensor:
        if attention is None:
            return x
        block = [1, 1, 1, -1]
        return fake_quantize(x, block, choose_scale(x, block, attention, torch.float32), attention, x.dtype)

    def attend(module: Attention, x: Tensor, text: Tensor, cross: bool) -> Tensor:
        q, k, v = module.heads(x, text)
        q, v = rounded(q), rounded(v)
        k = torch.cat([k[..., :1, :], rounded(k[..., 1:, :])], -2) if cross else rounded(k)
        p = (q @ k.mT / 4).softmax(-1)
        p = torch.tensor(by_hand(p.numpy(), 4, cross)).float()
        return (p @ v).transpose(1, 2).flatten(2)

    data = sample(3)
    x = data["x"] + attend(float_model.inside, data["x"], data["x"], False)
    wanted = x + attend(float_model.across, x, data["text"], True)
    # a probability at the middle of two powers in the exponent may go either way: few elements, a factor of two of each
    for found in (converted(**data), lower(converted)(**data)):
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2
        assert float(((found - wanted).abs() < 1e-4).float().mean()) > 0.9
    rows = [row for row in layer_summaries(quantizer.decisions.values(), kept) if row.kind == "attention"]
    assert [(row.name, row.activation, row.probabilities) for row in rows] == [
        ("inside", attention, "log2_4"),
        ("across", attention, "log2_4"),
    ]
    assert {unit_of(row, None, torch.device("cpu")) for row in rows} == {"float32 products, plain operators"}


@torch.no_grad()
def test_bfloat16_models_keep_their_type() -> None:
    graph, float_model, _ = prepared(replace(CONFIG, attention="e2m3"), dtype=torch.bfloat16)
    graph(**sample(dtype=torch.bfloat16))
    found = lower(convert_pt2e(graph))(**sample(dtype=torch.bfloat16))
    wanted = float_model(**sample(dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.5


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"attention_probabilities='log2_8'; choose one of None, log2_3"):
        replace(CONFIG, attention_probabilities="log2_8")
    record: Any = type("Record", (), {"decisions": [Decision("a.attn", "attention", CONFIG, "")]})()
    with pytest.raises(ValueError, match=r"a\.attn was quantized with attention_probabilities.*form='graph'"):
        check_online(record)
