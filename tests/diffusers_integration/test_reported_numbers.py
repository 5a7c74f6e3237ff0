"""Numbers that people and libraries read off quantized weights and models: of what is stored, or of the float model.

Memory is that of the stored tensors. Shapes, types, counts of weights, and what a library multiplies from these, are those of
the float model: by them LoRAs are shaped, inputs cast, checkpoints compared, and tensors that share memory found.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compute_module_sizes
from huggingface_hub import get_torch_storage_size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torchao.utils import TorchAOBaseTensor, get_model_size_in_bytes

from fp4dit_ao import FP4DiTConfig, QuantizedTransformer, example_inputs, load_pipeline, unpack_weights
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTDiffusersQuantizer
from fp4dit_ao.diffusers_integration.module_form import record_of, tensors_to_save
from fp4dit_ao.diffusers_integration.text_encoders import load_text_encoder, quantize_text_encoder
from tests.conftest import ROOT
from tests.diffusers_integration.test_first_compiled_call import low_bit_linear
from tests.diffusers_integration.test_lora import adapter, flux
from tests.diffusers_integration.test_stand_ins import RECIPES as KINDS
from tests.diffusers_integration.test_stand_ins import kinds_of_weights
from tests.tiny import tiny_pipeline

ROWS, COLUMNS = 64, 256
STORED = {
    "w4a6": (ROWS * COLUMNS // 2 + ROWS * 2 * 4, None),  # float32 scales of two groups
    "w4a6_codebook": (ROWS * COLUMNS // 2 + ROWS + ROWS * 4 + 16 * 16, None),  # two indices a byte, a float a row
    "nvfp4": (ROWS * COLUMNS // 2 + ROWS * COLUMNS // 16 + 4, None),
    "nvfp4_four_over_six_both": (ROWS * COLUMNS // 2 + ROWS * COLUMNS // 16 + 4, None),
    "mxfp4": (ROWS * COLUMNS // 2 + ROWS * COLUMNS // 32, None),
    "mxfp6_e2m3": (ROWS * COLUMNS + ROWS * COLUMNS // 32, None),  # a byte a code
    "w4a6 in int8": (ROWS * COLUMNS + ROWS * 2 * 4, "int8"),
    "w4a6 in fp8": (ROWS * COLUMNS + ROWS * 2 * 4, "fp8"),
}
"""Bytes of a weight of each kind, computed by hand, and what it was unpacked to."""


def flops(call: Callable[..., Any], *given: Any, **named: Any) -> int:
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # others have no formula on CPUs
        call(*given, **named)
    return int(counter.get_total_flops())


def linear_of(kind: str) -> nn.Linear:
    linear, to = low_bit_linear(kind.partition(" ")[0]), STORED[kind][1]
    return linear if to is None else unpack_weights(linear, to)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_a_weight(kind: str, dtype: torch.dtype) -> None:
    linear = linear_of(kind).to(dtype)
    weight: Any = linear.weight
    stored = STORED[kind][0]
    assert weight.nbytes == weight.detach().nbytes == stored
    assert get_torch_storage_size(weight) == stored  # by which the hub's helpers cut shards
    assert get_model_size_in_bytes(nn.Sequential(linear)) == stored + linear.bias.nbytes
    # of the float weight that it presents
    assert (weight.shape, weight.dtype, weight.numel()) == ((ROWS, COLUMNS), dtype, ROWS * COLUMNS)
    assert weight.element_size() == weight.itemsize == dtype.itemsize
    assert weight.untyped_storage().nbytes() > stored  # where shared tensors are looked for; there is no such memory


def test_a_part_of_a_weight_counts_its_part() -> None:
    weight: Any = linear_of("w4a6").weight
    assert weight[: ROWS // 2].nbytes == weight.nbytes // 2 == weight.t().nbytes // 2


@pytest.mark.parametrize("kind", STORED)
def test_flops_of_a_linear(kind: str) -> None:
    x = torch.randn(3, 5, COLUMNS)
    assert flops(linear_of(kind), x) == flops(nn.Linear(COLUMNS, ROWS), x) == 2 * 3 * 5 * ROWS * COLUMNS


def test_every_product_has_a_formula() -> None:
    """``attention`` consists of others."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fp4dit_ao" / "kernels").rglob("*.py")]
    defined = {name for text in sources for name in re.findall(r'LIBRARY\.define\(\s*"(\w+)\(', text)}
    products = {name for name in defined if re.search("(linear|product|attention)$", name)} - {"attention"}
    assert len(products) > 6
    assert {name for name in products if getattr(torch.ops.fp4dit_ao, name) not in flop_registry} == set()


def test_flops_of_attention() -> None:
    """On tensors without values, since not every processor has these kernels."""
    q, k = torch.empty(2, 3, 5, 16, device="meta"), torch.empty(2, 3, 7, 16, device="meta")
    expected = flops(torch.nn.functional.scaled_dot_product_attention, q, k, k)
    assert expected == 2 * 2 * 3 * 5 * 7 * 16 * 2
    digits, scales = (x.unsqueeze(0).char() for x in (q, k)), (q[..., 0], k[..., 0])
    a, b = zip(digits, scales, strict=True)
    assert flops(torch.ops.fp4dit_ao.int8_attention, *a, *b, *b, None, 0.25, torch.float32) == expected
    rows = [torch.empty(2, x.shape[2], 3, 32, device="meta", dtype=torch.float8_e4m3fn) for x in (q, k)]
    a, b = zip(rows, scales, strict=True)
    assert flops(torch.ops.fp4dit_ao.fp8_attention, *a, *b, k.transpose(1, 2).bfloat16(), 0.25) == expected


def test_every_kind_of_weight_is_among_them() -> None:
    tried = {type(linear_of(kind).weight).__name__ for kind in STORED}
    assert tried == kinds_of_weights()


# --- models ----------------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module) -> int:
    """Bytes of the plain tensors that parameters and buffers consist of, by torch's own protocol of subclasses."""

    def bytes_of(x: Any) -> int:
        if not hasattr(x, "__tensor_flatten__"):
            return int(x.numel() * x.element_size())
        return sum(bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])

    return sum(map(bytes_of, (*model.parameters(), *model.buffers())))


def loaded(quantized: Any, folder: Path, **how: Any) -> Any:
    quantized.save_pretrained(folder)
    return load_pipeline(folder, **how).transformer


def with_lora(model: Any) -> Any:
    model.load_lora_adapter(adapter(model, 1))
    return model


def loaded_encoder(folder: Path) -> Any:
    quantize_text_encoder(encoder()).save_pretrained(folder)
    return load_text_encoder(folder)


def transformer() -> Any:
    return tiny_pipeline(layers=1).transformer


def encoder() -> Any:
    return tiny_pipeline(layers=1).text_encoder


MODELS: dict[str, tuple[Callable[[Any, Path], Any], Callable[[], Any] | None]] = {
    "graph": (lambda pipe, folder: pipe.transformer, transformer),
    "graph in bfloat16": (lambda pipe, folder: copy.deepcopy(pipe.transformer).to(torch.bfloat16), transformer),
    "graph in bytes": (lambda pipe, folder: loaded(pipe, folder, weights="int8"), transformer),
    "modules": (lambda pipe, folder: pipe.transformer.to_modules(), transformer),
    "modules in bytes": (lambda pipe, folder: loaded(pipe, folder, form="module", weights="int8"), transformer),
    "modules, one linear split": (lambda pipe, folder: flux(), lambda: flux(None)),
    "modules with a LoRA": (lambda pipe, folder: with_lora(flux()), None),
    "text encoder": (lambda pipe, folder: quantize_text_encoder(encoder()), encoder),
    "text encoder, loaded": (lambda pipe, folder: loaded_encoder(folder), encoder),
}
"""Every form of a quantized model, and the float model that it was made from, where it has no more weights than that."""


@pytest.mark.parametrize("form", MODELS)
def test_numbers_of_a_model(tiny_quantized: Any, tmp_path: Path, form: str) -> None:
    made, float_model = MODELS[form]
    model = made(tiny_quantized, tmp_path / "saved")
    assert model.get_memory_footprint() == parts_of(model)
    assert model.get_memory_footprint(return_buffers=False) == parts_of(model) - sum(x.nbytes for x in model.buffers())
    if isinstance(model, QuantizedTransformer):
        rows = {row.name: row.bytes for row in model.summary()}
        weights = {n: x.nbytes for n, x in model.graph.named_parameters() if isinstance(x, TorchAOBaseTensor)}
        assert weights == {name: rows[name.removesuffix(".weight")] for name in weights}
        assert sum(weights.values()) < model.nbytes() == parts_of(model)
    if float_model is not None:
        assert model.num_parameters() == float_model().num_parameters()
        assert model.dtype == (torch.bfloat16 if "bfloat16" in form else torch.float32)
        given = (
            {"input_ids": torch.ones(1, 8, dtype=torch.int64)} if "encoder" in form else example_inputs(float_model())
        )
        at_its_type = tree_map_only(Tensor, lambda x: x.to(model.dtype) if x.is_floating_point() else x, given)
        assert flops(model, **at_its_type) == flops(float_model(), **given) > 0
    if float_model is not None and not form.startswith("graph"):  # which has tables besides
        assert compute_module_sizes(model)[""] == compute_module_sizes(float_model())[""] > parts_of(model)


@pytest.mark.parametrize("recipe", KINDS)
def test_a_model_is_spread_over_devices_by_what_it_will_take(recipe: str) -> None:
    """While it loads, float or quantized: what accelerate counts for ``device_map="auto"`` is what the model takes, or more."""
    model = flux(recipe)
    taken = model.get_memory_footprint()
    record = dataclasses.replace(
        record_of(model), tensors={name: Entry.unchecked(x) for name, x in tensors_to_save(model).items()}
    )
    for stored in (None, record.to_json()):
        config = FP4DiTConfig(recipe)
        config.stored = stored
        quantizer = FP4DiTDiffusersQuantizer(config, pre_quantized=stored is not None)
        empty = empty_model(dict(flux(None).config) | {"_class_name": "FluxTransformer2DModel"}, buffers=True)
        quantizer.preprocess_model(empty)
        special: Any = quantizer.get_special_dtypes_update(empty, torch.float32)
        counted = compute_module_sizes(empty, torch.float32, special)[""]
        room = quantizer.adjust_max_memory({"cpu": 1})["cpu"]
        assert taken <= counted / room < 1.3 * taken
