"""A saved transformer comes back bit for bit, or is refused with one sentence that says what is wrong with it."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4dit_ao import MinifloatTensor, quantize_pipeline
from fp4dit_ao.checkpoint import graph_tensors, tensor_files, transformer_folder
from fp4dit_ao.checkpoint.quantization_record import digest
from fp4dit_ao.checkpoint.tensor_files import WEIGHTS, checksum
from fp4dit_ao.checkpoint.transformer_folder import CONFIG
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.util.atomic_files import whole_folder
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def transformer() -> Any:
    pipe = quantize_pipeline(
        tiny_pipeline(layers=1), "w4a6", prompts=["a cat"], rounding="nearest", progress=False, **CALL
    )
    return pipe.transformer


@pytest.fixture(scope="module")
def original(transformer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "transformer"
    transformer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "transformer"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def change_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the quantization_config and bring its checksum up to date."""

    def spoil(config: dict[str, Any]) -> None:
        data = config["quantization_config"]
        change(data)
        data["sha256"] = digest({key: value for key, value in data.items() if key != "sha256"})

    change_config(folder, spoil)


# --- the round trip --------------------------------------------------------------------------------------------------


def test_every_tensor_comes_back_bit_for_bit(transformer: Any, original: Path) -> None:
    loaded = load_graph(original)
    before, after = graph_tensors.state_of(transformer.graph), graph_tensors.state_of(loaded.graph)
    assert before.keys() == after.keys()
    for name, x in before.items():
        y = after[name]
        assert type(x) is type(y)
        assert type(x.data) is type(y.data)
        for a, b in zip(graph_tensors.flatten(name, x).values(), graph_tensors.flatten(name, y).values(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    numbered = re.compile(r"(_weight)_\d+\b")  # names of nodes count what was there when they were made
    assert numbered.sub(r"\1", loaded.graph.code) == numbered.sub(r"\1", transformer.graph.code)
    assert loaded.config == transformer.config
    assert loaded.decisions == transformer.decisions
    assert loaded.recipe == transformer.recipe
    assert loaded.summary() == transformer.summary()


def test_the_file_holds_codes_and_scales_and_no_float_copy(transformer: Any, original: Path) -> None:
    stored = load_file(original / WEIGHTS)
    quantized = {name for name, p in transformer.graph.named_parameters() if isinstance(p, MinifloatTensor)}
    assert len(quantized) == 10
    for name in quantized:
        assert name not in stored
        out_features, in_features = dict(transformer.graph.named_parameters())[name].shape
        assert stored[f"{name}.qdata"].dtype == torch.uint8
        assert stored[f"{name}.qdata"].shape == (out_features, in_features // 2)
        assert stored[f"{name}.scale"].shape == (out_features, in_features // 128)
    assert sum(x.nbytes for x in stored.values()) == transformer.nbytes()
    assert sorted(path.name for path in original.iterdir()) == [CONFIG, WEIGHTS]


def test_the_config_says_what_was_done_with_what(original: Path) -> None:
    config = json.loads((original / CONFIG).read_text())
    assert config["_class_name"] == "PixArtTransformer2DModel"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "fp4dit_ao"
    assert quantization["format_version"] == 2
    assert quantization["recipe"]["weight"] == "e2m1"
    assert set(quantization["versions"]) == {"fp4dit-ao", "torch", "torchao", "diffusers"}
    kept = {layer["name"]: layer["reason"] for layer in quantization["layers"] if layer["config"] is None}
    assert kept["proj_out"] == "recipe keeps 'proj_out*'"


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("load", [load_graph, load_modules])
def test_scales_that_no_quantization_gives_are_refused_behind_right_checksums(
    saved: Path, scale: float, load: Any
) -> None:
    tensors = load_file(saved / WEIGHTS)
    name = next(name for name in tensors if name.endswith("to_k.weight.scale"))
    tensors[name][1, 0] = scale
    save_file(tensors, saved / WEIGHTS, {"format": "pt", "quant_method": "fp4dit_ao", "format_version": "2"})
    change_record(saved, lambda record: record["tensors"][name].update(sha256=checksum(tensors[name])))
    with pytest.raises(ValueError, match=rf"tensor {name} holds a scale of .*; scales are positive and finite"):
        load(saved)


def test_files_are_the_same_bytes_whenever_they_are_saved(transformer: Any, original: Path, tmp_path: Path) -> None:
    for again in ("first", "second", "third"):
        transformer.save_pretrained(tmp_path / again)
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / again / name).read_bytes() == (original / name).read_bytes()


def test_saving_again_replaces(transformer: Any, saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    transformer.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["transformer"]
    assert transformer_folder.read_config(saved)["quantization_config"]["format_version"] == 2


# --- damaged and foreign folders -------------------------------------------------------------------------------------


def test_truncated_weights(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"safetensors is truncated: [\d,]+ of [\d,]+ bytes; copy it again"):
        load_graph(saved)


def test_one_flipped_bit_of_a_tensor_is_found_and_the_tensor_named(saved: Path) -> None:
    data = bytearray((saved / WEIGHTS).read_bytes())
    header = int.from_bytes(data[:8], "little")
    places = json.loads(data[8 : 8 + header])
    name = "transformer_blocks.0.attn1.to_q.weight.qdata"
    data[8 + header + places[name]["data_offsets"][0] + 17] ^= 4
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: tensor {name} was altered since it was saved"):
        load_graph(saved)


def test_appended_bytes(saved: Path) -> None:
    with (saved / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="safetensors is altered since it was saved"):
        load_graph(saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}"):
        load_graph(saved)


def test_tensors_that_do_not_fit(saved: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q.weight.scale"
    tensors = {name: x.clone() for name, x in load_file(saved / WEIGHTS).items()}  # the file is about to change
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{name} is \(1, 128\) of float32, saved as \(128, 1\) of float32"):
        load_graph(saved)
    change_record(saved, lambda r: r["tensors"][name].update(shape=[1, 128], sha256=checksum(tensors[name])))
    with pytest.raises(ValueError, match=rf"{name} is \(1, 128\) of torch.float32, where the model has \(128, 1\)"):
        load_graph(saved)
    with pytest.raises(ValueError, match=rf"{name} is \(1, 128\), where PixArtTransformer2DModel has \(128, 1\)"):
        load_modules(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("proj_out.bias"), "it lacks proj_out.bias"),
        (lambda g: g.update(extra=torch.ones(1)), "it holds extra, which the model does not have"),
    ],
)
def test_tensors_missing_or_left_over(transformer: Any, change: Callable[[Any], None], message: str) -> None:
    state = graph_tensors.state_of(transformer.graph)
    stored = {k: v for name, x in state.items() for k, v in graph_tensors.flatten(name, x).items()}
    change(stored)
    with pytest.raises(ValueError, match=message):
        graph_tensors.fill(transformer.graph, stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["quantization_config"].update(format_version=4),
            "has format version 4, this fp4dit_ao reads 2 and 3; update",
        ),
        (
            lambda c: c["quantization_config"].update(format_version=1),
            "has format version 1, .*; quantize the model again",
        ),
        (lambda c: c["quantization_config"].update(quant_method="bitsandbytes"), "was quantized by bitsandbytes"),
        (lambda c: c.pop("quantization_config"), "holds no quantized transformer"),
        (lambda c: c["quantization_config"].update(dtype="float16"), "config.json was altered since it was saved"),
        (lambda c: c.update(num_layers=2), "config.json was altered since it was saved: its 'num_layers' is 2, not 1"),
        (lambda c: c.pop("patch_size"), "config.json was altered since it was saved: its 'patch_size' is None, not 2"),
    ],
)
def test_foreign_and_altered_configs(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    change_config(saved, change)
    for load in (load_graph, load_modules):
        with pytest.raises(ValueError, match=message) as caught:
            load(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("layers"), "config.json is damaged"),
        (lambda r: r.update(tensors=[]), "config.json is damaged"),
        (lambda r: r["tensors"]["proj_out.bias"].update(shape=[-16]), "config.json is damaged"),
        (lambda r: r["tensors"]["proj_out.bias"].update(shape=[2**40, 2**40]), "safetensors is truncated|does not fit"),
        (
            lambda r: r["tensors"].pop("proj_out.bias"),
            "safetensors is altered since it was saved|lacks tensor proj_out.bias",
        ),
        (lambda r: r["configs"][0].update(weight="e9m9"), "config.json is damaged"),
        (lambda r: r["layers"][0].update(config=99), "config.json is damaged"),
    ],
)
def test_records_that_were_made_up(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    """With a checksum that fits: whoever writes a file can write that, too."""
    change_record(saved, change)
    for load in (load_graph, load_modules):
        with pytest.raises(ValueError, match=message) as caught:
            load(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "Path", "has no model class 'Path'"),
        ("num_attention_heads", "two", "PixArtTransformer2DModel cannot be made from its config"),
        ("num_layers", 10**9, "it has more than the .* parameters that go with what is stored"),
        ("num_layers", 2, "does not fit its own config: it lacks"),
        ("patch_size", 0, "cannot be made from its config"),
    ],
)
def test_models_that_were_made_up(saved: Path, key: str, value: Any, message: str) -> None:
    change_record(saved, lambda r: r["model"].update({key: value}))
    change_config(saved, lambda c: c.update({key: value}))
    for load in (load_graph, load_modules):
        with pytest.raises(ValueError, match=message) as caught:
            load(saved)
        assert "\n" not in str(caught.value)


def test_tables_beyond_all_memory_are_not_made(saved: Path) -> None:
    change_record(saved, lambda r: r["model"].update(sample_size=10**6))
    change_config(saved, lambda c: c.update(sample_size=10**6))
    with pytest.raises(ValueError, match="its model makes tables larger than any known model's"):
        load_modules(saved)


def test_config_that_is_not_json(saved: Path) -> None:
    (saved / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is damaged: it is not valid JSON"):
        load_graph(saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="holds no quantized transformer"):
        load_graph(saved)


def test_a_float_transformer_is_not_mistaken_for_a_quantized_one(tmp_path: Path) -> None:
    tiny_pipeline(layers=1).transformer.save_pretrained(tmp_path / "float")
    with pytest.raises(
        ValueError, match="holds no quantized transformer; load it with diffusers, then use quantize_pipeline"
    ):
        load_graph(tmp_path / "float")


# --- saving that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(
    transformer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def write_half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(tensor_files, "save_file", write_half)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        transformer.save_pretrained(tmp_path / "out")
    if isinstance(failure, OSError):
        assert (
            str(caught.value)
            == f"cannot save to {tmp_path / 'out'}: No space left on device; nothing was written there"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_keeps_what_was_there(transformer: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(tensor_files, "checksum", lambda x: pytest.fail("interrupted"))
    with pytest.raises(BaseException, match="interrupted"):
        transformer.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["transformer"]


def test_unwritable_targets(transformer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="it is a file; name a new folder"):
        transformer.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot save to .*file/out: Not a directory; nothing was written there"):
        transformer.save_pretrained(tmp_path / "file" / "out")
    with pytest.raises(FileExistsError, match="the folder is not empty; name a new one, or empty it"):
        transformer.save_pretrained(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="saved as safetensors only"):
        transformer.save_pretrained(tmp_path / "out", safe_serialization=False)


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Permission denied"), whole_folder(target, replaceable=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["old"]
