"""Exported transformers run without the model's class, give the same bits, and stay dynamic."""

import io
import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torchao.utils import TorchAOBaseTensor
from typer.testing import CliRunner

from fp4dit_ao import MinifloatTensor, quantize_pipeline, unpack_weights
from fp4dit_ao._compat import pytree
from fp4dit_ao.cli.app import app
from fp4dit_ao.cli.export import find_transformer
from fp4dit_ao.deploy import exported_transformer
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.kernels import token_quantization
from fp4dit_ao.passes.subclass_unwrapping import unwrap
from tests.tiny import CALL, tiny_pipeline

SHAPES = {"captured": (2, 8, 16, 8), "one": (1, 8, 8, 1), "square": (3, 12, 12, 5), "large": (5, 10, 16, 3)}
"""(batch, height, width, text length)."""


def sample(batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 128, generator=generator),
        "timestep": torch.full((1,), 500).expand(batch),  # as pipelines pass it
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@pytest.fixture(scope="module")
def program(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    exported_transformer.save_program(tiny_quantized.transformer, path)
    return path


@pytest.fixture(scope="module")
def mixed() -> Any:
    """The tiny pipeline with each kind of weight that is multiplied in its own way: of ``w4a6``, in codebook groups, in NVFP4."""
    how = {"prompts": ["a cat"], "rounding": "nearest", "progress": False}
    layers = {"*.ff.net.0.proj": "w4a6_codebook", "*.ff.net.2": "nvfp4"}
    return quantize_pipeline(tiny_pipeline(layers=1), "w4a6", layers=layers, **how, **CALL)


@pytest.fixture(scope="module")
def package(mixed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One package of all kinds of weights, as the command writes it: compiling one takes long."""
    folder = tmp_path_factory.mktemp("export")
    mixed.save_pretrained(folder / "pipe")
    path = folder / "package.pt2"
    with pytest.MonkeyPatch.context() as patch:  # as of a model whose tokens are worth the compiled loop
        patch.setattr(token_quantization, "_WORTHWHILE_ELEMENTS", 0)
        result = CliRunner().invoke(app, ["export", str(folder / "pipe"), str(path), "--aoti", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return path


def elsewhere(path: Path, inputs: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, Tensor]:
    """What an exported file gives in a process that has neither the model's class nor diffusers."""
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, torch; from fp4dit_ao import export\n"
        "model = export.load(sys.argv[1]); inputs = torch.load(sys.argv[2])\n"
        "torch.save({name: model(**x)[0] for name, x in inputs.items()}, sys.argv[3])\n"
        "heavy = {'diffusers', 'transformers', 'torchao', 'fp4dit_ao.tensors.minifloat'}\n"
        "assert not heavy & set(sys.modules), 'too much imported'"
    )
    arguments = [str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs: dict[str, Tensor] = torch.load(tmp_path / "outputs.pt")
    return outputs


# --- programs --------------------------------------------------------------------------------------------------------


def test_a_program_gives_the_graphs_bits_in_another_process(program: Path, tiny_quantized: Any, tmp_path: Path) -> None:
    inputs = {name: sample(*shape) for name, shape in SHAPES.items()}
    outputs = elsewhere(program, inputs, tmp_path)
    for name, x in inputs.items():
        assert torch.equal(outputs[name], tiny_quantized.transformer(**x, return_dict=False)[0]), name


def test_plain_torch_reads_a_program(program: Path, tiny_quantized: Any) -> None:
    exported = torch.export.load(program)
    weights = exported.state_dict
    assert weights["transformer_blocks.0.attn1.to_q.weight_qdata"].dtype == torch.uint8
    assert not any(isinstance(x, MinifloatTensor) for x in weights.values())
    x = sample(2, 8, 8, 8)
    constants = {"cross_attention_kwargs": None, "attention_mask": None, "return_dict": False}
    (output,) = exported.module()(**x, **constants)
    assert torch.equal(output, tiny_quantized.transformer(**x).sample)


def test_nothing_in_a_program_is_pickled(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not zipfile.is_zipfile(io.BytesIO(content)), f"{name} is a torch.save file"
            assert not (content[:1] == b"\x80" and content[-1:] == b"."), f"{name} is a pickle"


def test_a_program_with_joined_linears_gives_the_same_bits(tiny_quantized: Any) -> None:
    """Graph that a package is compiled from."""
    exported = exported_transformer.export_program(tiny_quantized.transformer, joined=True)
    weights = exported.state_dict
    assert "transformer_blocks.0.attn1.to_q.joined_weight_qdata" in weights
    assert "transformer_blocks.0.attn1.to_k.weight_qdata" not in weights
    constants = {"cross_attention_kwargs": None, "attention_mask": None, "return_dict": False}
    for shape in ("one", "square"):
        x = sample(*SHAPES[shape])
        assert torch.equal(exported.module()(**x, **constants)[0], tiny_quantized.transformer(**x).sample), shape


def test_half_precision(tiny_quantized: Any, tmp_path: Path) -> None:
    tiny_quantized.transformer.save_pretrained(tmp_path / "saved")
    half = load_graph(tmp_path / "saved").to(torch.bfloat16)
    exported_transformer.save_program(half, tmp_path / "half.pt2")
    loaded = exported_transformer.load(tmp_path / "half.pt2")
    assert loaded.dtype == torch.bfloat16
    x = pytree.tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, sample(3, 8, 12, 6))
    (output,) = loaded(**x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, half(**x).sample)
    with pytest.raises(ValueError, match=r"hidden_states is torch.float32, it was captured as torch.bfloat16"):
        loaded(**sample(3, 8, 12, 6))


def test_block_formats_export_too(mixed: Any, tmp_path: Path) -> None:
    transformer = mixed.transformer
    exported_transformer.save_program(transformer, tmp_path / "model.pt2")
    weights = torch.export.load(tmp_path / "model.pt2").state_dict
    assert not any(isinstance(x, TorchAOBaseTensor) for x in weights.values())
    name = "transformer_blocks.0.ff.net.2.weight"
    stored = transformer.graph.get_parameter(name)
    assert torch.equal(weights[f"{name}_qdata"], stored.qdata)
    assert torch.equal(weights[f"{name}_scale"].view(torch.uint8), stored.scale.view(torch.uint8))
    inputs = {name: sample(*SHAPES[name]) for name in ("captured", "square")}
    outputs = elsewhere(tmp_path / "model.pt2", inputs, tmp_path)
    for name, x in inputs.items():
        assert torch.equal(outputs[name], transformer(**x, return_dict=False)[0]), name


def test_unpacked_weights_are_exported_before(tiny_quantized: Any, tmp_path: Path) -> None:
    tiny_quantized.transformer.save_pretrained(tmp_path / "saved")
    model = unpack_weights(load_graph(tmp_path / "saved"))
    with pytest.raises(ValueError, match="exporting needs packed weights"):
        exported_transformer.save_program(model, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


# --- packages --------------------------------------------------------------------------------------------------------


def test_a_package_gives_the_compiled_graphs_bits_in_another_process(package: Path, mixed: Any, tmp_path: Path) -> None:
    transformer = mixed.transformer
    inputs = {name: sample(*shape) for name, shape in SHAPES.items()}
    outputs = elsewhere(package, inputs, tmp_path)
    with zipfile.ZipFile(package) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    called = set(re.findall(rb"fp4dit_ao::(\w+)", content))
    assert called >= {b"int8_tokens", b"int8_linear", b"codebook_linear"}  # NVFP4's weights are multiplied by aten's
    transformer.compile_graph()
    try:
        with torch.no_grad():  # else a backward graph is compiled, too
            for name in ("captured", "large"):  # one compilation serves both
                assert torch.equal(outputs[name], transformer(**inputs[name]).sample), name
    finally:
        transformer.compile_graph(False)
    for name, x in inputs.items():
        expected = transformer(**x).sample
        assert (outputs[name] - expected).norm() / expected.norm() < 0.05, name


# --- calls and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["program", "package"])
def test_calls_that_the_graph_cannot_honour_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    model = exported_transformer.load(request.getfixturevalue(kind))
    assert (model.kind, model.class_name, model.dtype) == (kind, "PixArtTransformer2DModel", torch.float32)
    x = sample(2, 8, 16, 8)
    with pytest.raises(ValueError, match="exported PixArtTransformer2DModel: no argument lora; it takes hidden_states"):
        model(**x, lora=1)
    with pytest.raises(ValueError, match="attention_mask is fixed to None"):
        model(**x, attention_mask=torch.ones(2, 8))
    del x["timestep"]
    with pytest.raises(ValueError, match="timestep must be a tensor, found None"):
        model(**x)


TENSORS = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")


@pytest.mark.parametrize("kind", ["program", "package"])
def test_tensors_of_another_type_are_refused_with_the_remedy(kind: str, request: pytest.FixtureRequest) -> None:
    model = exported_transformer.load(request.getfixturevalue(kind))
    x = sample(2, 8, 16, 8)
    for name, dtype in itertools.product(
        TENSORS, [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16]
    ):
        captured = x[name].dtype
        if dtype != captured:
            message = f"{name} is {dtype}, it was captured as {captured}; pass {name}.to({captured})"
            with pytest.raises(ValueError, match=re.escape(message)):
                model(**x | {name: x[name].to(dtype)})
    mask = x["encoder_attention_mask"].to(torch.bool)
    (output,) = model(**x | {"encoder_attention_mask": mask.to(torch.int64)})  # as the sentence says
    assert torch.equal(output, model(**x)[0])


@pytest.mark.parametrize("kind", ["program", "package"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("hidden_states", (2, 5, 8, 16), r"\.shape\[1\] is 5, it was captured as 4, which is fixed"),
        ("encoder_hidden_states", (2, 8, 64), r"\.shape\[2\] is 64, it was captured as 128, which is fixed"),
        ("encoder_hidden_states", (3, 8, 128), r"\.shape\[0\] is 3, it must be 2, as hidden_states\.shape\[0\] is"),
        ("encoder_attention_mask", (2, 9), r"\.shape\[1\] is 9, it must be 8, as encoder_hidden_states\.shape\[1\] is"),
        ("timestep", (1,), r"\.shape\[0\] is 1, it must be 2, as hidden_states\.shape\[0\] is"),
        ("timestep", (), r" must have 1 dimensions, found shape \(\)"),
    ],
)
def test_tensors_of_other_shapes_are_refused(
    kind: str, name: str, shape: tuple[int, ...], message: str, request: pytest.FixtureRequest
) -> None:
    model = exported_transformer.load(request.getfixturevalue(kind))
    x = sample(2, 8, 16, 8)
    with pytest.raises(ValueError, match=f"exported PixArtTransformer2DModel: {name}{message}"):
        model(**x | {name: torch.ones(shape, dtype=x[name].dtype)})
    with pytest.raises(ValueError, match=rf"{name} is on meta, it was captured on cpu; pass {name}.to\('cpu'\)"):
        model(**x | {name: x[name].to("meta")})


@pytest.mark.parametrize("kind", ["program", "package"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_mask_of_another_batch_is_refused(kind: str, batch: int, request: pytest.FixtureRequest) -> None:
    model = exported_transformer.load(request.getfixturevalue(kind))
    x = sample(2, 8, 16, 8)
    message = rf"encoder_attention_mask \({batch}, 8\) .*do not fit: .*encoder_attention_mask\.shape\[0\].* must hold"
    with pytest.raises(ValueError, match=message):
        model(**x | {"encoder_attention_mask": torch.ones(batch, 8, dtype=torch.int64)})


def test_files_that_are_no_export_are_refused(program: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        exported_transformer.load(tmp_path / "none.pt2")
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(program.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.pt2 is no \.pt2 archive, or cut short"):
        exported_transformer.load(cut)
    foreign = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), foreign)
    with pytest.raises(ValueError, match="was not written by this version's fp4dit-ao export"):
        exported_transformer.load(foreign)
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"other.pt2 "):
        exported_transformer.load(other)


def test_the_command_writes_codes_and_scales_for_other_tools(tiny_quantized: Any, tmp_path: Path) -> None:
    from fp4dit_ao import read_single_file

    tiny_quantized.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "codes.safetensors"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "pipe"), str(out)])
    assert result.exit_code == 0, result.output
    name = "transformer_blocks.0.attn1.to_q"
    weight = tiny_quantized.transformer.graph.get_parameter(f"{name}.weight").dequantize(torch.float32)
    assert torch.equal(torch.from_numpy(read_single_file(out).weight(name)), weight)


def test_the_command(tiny_quantized: Any, tmp_path: Path) -> None:
    tiny_quantized.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "model.pt2"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "pipe"), str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    x = sample(2, 8, 12, 3)
    assert torch.equal(exported_transformer.load(out)(**x)[0], tiny_quantized.transformer(**x).sample)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "pipe"]
    folder = tmp_path / "pipe" / "transformer"
    assert find_transformer(str(tmp_path / "pipe")) == find_transformer(str(folder)) == folder


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        ("float", "m.pt2", "holds no quantized transformer; make one with: fp4dit-ao quantize"),
        ("saved", "m.onnx", "cannot export to m.onnx: the name must end in .pt2"),
        ("saved", ".", "cannot write"),
    ],
)
def test_wrong_arguments_are_refused(tiny_quantized: Any, tmp_path: Path, model: str, out: str, message: str) -> None:
    (tmp_path / "float").mkdir()
    tiny_quantized.transformer.save_pretrained(tmp_path / "saved")
    result = CliRunner().invoke(app, ["export", str(tmp_path / model), str(tmp_path / out), "--device", "cpu"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.glob("m.*"))


# --- the rewrite -----------------------------------------------------------------------------------------------------


def test_unwrap(tiny_quantized: Any) -> None:
    graph = tiny_quantized.transformer.graph
    before = {name for name, _ in graph.named_parameters()}
    plain = unwrap(graph)
    assert {name for name, _ in graph.named_parameters()} == before
    node = next(n for n in plain.graph.nodes if n.op == "call_function" and n.target.__name__ == "linear")
    assert_expected_inline(
        "\n".join(str(n.format_node()) for n in [*node.args[1:3], node]),
        """\
%transformer_blocks_0_attn1_to_q_weight_qdata : [num_users=1] = get_attr[target=transformer_blocks.0.attn1.to_q.weight_qdata]
%transformer_blocks_0_attn1_to_q_weight_scale : [num_users=1] = get_attr[target=transformer_blocks.0.attn1.to_q.weight_scale]
%linear_16 : [num_users=1] = call_function[target=fp4dit_ao.kernels.dispatch.linear](args = (%add_3, %transformer_blocks_0_attn1_to_q_weight_qdata, %transformer_blocks_0_attn1_to_q_weight_scale, [1, 128], e2m1, e2m3, %transformer_blocks_0_attn1_to_q_bias), kwargs = {})""",
    )
    assert plain.proj_out.weight is graph.proj_out.weight
    x = sample(2, 8, 12, 3)
    constants = {"cross_attention_kwargs": None, "attention_mask": None, "return_dict": False}
    with torch.no_grad():
        assert torch.equal(plain(**x, **constants)[0], graph(**x, **constants)[0])
