"""The file for other tools holds what docs/single_file.md says, and can be read with that page, NumPy and JSON alone."""

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import (
    MinifloatTensor,
    QuantConfig,
    export_single_file,
    quantize_modules,
    quantize_pipeline,
    read_single_file,
)
from fp4dit_ao.checkpoint import single_file
from fp4dit_ao.config import RECIPES
from tests.tiny import CALL, tiny_pipeline

LAYER = "transformer_blocks.0.attn1.to_q"
GATE = "transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return quantize_modules(tiny_pipeline(layers=1).to(torch.bfloat16).transformer, "w4a6")


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "t", max_shard_size="100KB")
    export_single_file(root / "t", root / "one.safetensors")
    return root / "one.safetensors"


def test_the_file_is_the_same_bytes_whenever_it_is_written(file: Path, tmp_path: Path) -> None:
    """The library writes the texts of the header in a random order."""
    for again in ("first", "second", "third"):
        export_single_file(file.parent / "t", tmp_path / f"{again}.safetensors")
        assert (tmp_path / f"{again}.safetensors").read_bytes() == file.read_bytes()


def test_by_the_page_alone(model: Any, file: Path) -> None:
    """An independent reading of the layout: header, nibbles, levels, scales."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    layers, formats = json.loads(metadata["layers"]), json.loads(metadata["formats"])

    def tensor(name: str, dtype: str) -> np.ndarray:
        start, stop = header[name]["data_offsets"]
        return np.frombuffer(data[8 + length :][start:stop], dtype).reshape(header[name]["shape"])

    assert {layers[LAYER]["weight"], layers[GATE]["weight"]} == {"e2m1", "e3m0"}
    assert formats["e2m1"]["levels"] == [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    for layer in (LAYER, GATE):
        levels = formats[layers[layer]["weight"]]["levels"]
        qdata, scale = tensor(f"{layer}.weight.qdata", "u1"), tensor(f"{layer}.weight.scale", "<f4")
        weight = model.get_submodule(layer).weight.dequantize(torch.float32)
        rows, columns = weight.shape
        for row, column in [(0, 0), (0, 1), (3, 77), (rows - 1, columns - 1)]:
            byte = int(qdata[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            assert np.float32(levels[code]) * scale[row, column // 128] == weight[row, column].item()


def test_the_reader_gives_every_weight(model: Any, file: Path) -> None:
    found = read_single_file(file)
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        if isinstance(parameter, MinifloatTensor):
            np.testing.assert_array_equal(found.weight(layer), parameter.dequantize(torch.float32).numpy())
            np.testing.assert_array_equal(found.codes(layer), parameter.codes.numpy())
        else:
            np.testing.assert_array_equal(found.tensors[name], parameter.detach().float().numpy())
    assert found.weight("proj_out").shape == tuple(model.proj_out.weight.shape)


def test_it_says_how_inputs_are_quantized_and_where_it_came_from(file: Path) -> None:
    metadata = read_single_file(file).metadata
    assert metadata["layers"][LAYER] == {
        "kind": "linear", "input": "e2m3", "input_scale": "token", "scheme": "grouped", "weight": "e2m1",
        "block_size": [1, 128],
    }  # fmt: skip
    assert metadata["layers"]["transformer_blocks.0.attn1"]["input"] == "e2m3"
    assert metadata["model"]["_class_name"] == "PixArtTransformer2DModel"
    assert set(metadata["versions"]) >= {"torch", "torchao", "diffusers"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d[:-10], r"tensor \S+ lies outside of the file, which is truncated"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), r"tensor \S+ was altered since it was saved"),
        (lambda d: b"\xff" * 8 + d[8:], "it claims a header of"),
        (lambda d: d[:8] + b"x" + d[9:], "its header cannot be read"),
        (lambda d: d.replace(b"fp4dit_ao.single_file", b"fp4dit_ao.single_fold"), "is no file of layout"),
        (lambda d: d[:4], "it claims a header of|its header cannot be read"),
    ],
)
def test_other_files_are_refused(file: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    (tmp_path / "x").write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_single_file(tmp_path / "x")


def test_a_failed_export_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no saved transformer"):
        export_single_file(tmp_path / "none", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def floats() -> Any:
    return tiny_pipeline(layers=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_comes_back_exactly(recipe: str, floats: Any, tmp_path: Path) -> None:
    """What the file says, by NumPy alone, against the tensors that the graph computes with."""
    pipe = quantize_pipeline(
        floats, recipe, prompts=["a red cat"], samples=2, rounding="nearest", progress=False, **CALL
    )
    transformer = pipe.transformer
    transformer.save_pretrained(tmp_path / "t")
    export_single_file(tmp_path / "t", tmp_path / "one.safetensors")
    found = read_single_file(tmp_path / "one.safetensors")
    quantized = 0
    for name, parameter in transformer.graph.named_parameters():
        layer, weight = name.removesuffix(".weight"), parameter.detach()
        if isinstance(weight, TorchAOBaseTensor):
            quantized += 1
            np.testing.assert_array_equal(found.weight(layer), weight.dequantize(torch.float32).numpy())
            np.testing.assert_array_equal(found.codes(layer), weight.codes.numpy())
        else:
            np.testing.assert_array_equal(found.tensors[name], weight.numpy())
    assert quantized == 10
    for name, buffer in transformer.graph.named_buffers():
        if name.endswith(".input_scale"):
            np.testing.assert_array_equal(found.tensors[name], buffer.numpy())
    static = [name for name in found.tensors if name.endswith(".input_scale")]
    assert bool(static) == (QuantConfig.from_name(recipe).activation_granularity == "tensor")


def test_hardware_floats_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Every byte of E4M3 and E8M0, against torch's conversion."""
    every = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E8M0", torch.float8_e8m0fnu)):
        expected = every.view(dtype).float().numpy()
        place = {"data_offsets": [0, 256], "dtype": name, "shape": [256]}
        data = every.numpy()
        np.testing.assert_array_equal(single_file._tensor("x", place, data, sha256(data).hexdigest()), expected)


def test_files_that_name_no_scheme_are_grouped(file: Path) -> None:
    """As they were written before there were several."""
    found = read_single_file(file)
    before = {k: v for k, v in found.metadata["layers"][LAYER].items() if k != "scheme"}
    old = single_file.SingleFile(found.tensors, {**found.metadata, "layers": {LAYER: before}})
    np.testing.assert_array_equal(old.weight(LAYER), found.weight(LAYER))
