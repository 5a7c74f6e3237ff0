"""Whatever happens to the files of a checkpoint: one sentence, or the model that was saved; and no memory but what it needs."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit_ao import QuantConfig, quantize_modules
from fp4dit_ao.checkpoint.quantization_record import digest
from fp4dit_ao.diffusers_integration import module_form
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from tests.tiny import tiny_pipeline

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, dict[str, Tensor]]:
    """A folder of three shards or more, and the tensors in it."""
    model = quantize_modules(tiny_pipeline(layers=1, width=64).transformer, "w4a6")
    folder = tmp_path_factory.mktemp("saved") / "transformer"
    model.save_pretrained(folder, max_shard_size="50KB")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(files) >= 5
    return files, module_form.tensors_to_save(model)


def check(files: Files, expected: dict[str, Tensor] | None, load: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        try:
            model = load(folder)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
            assert name in str(error)
            return
    if expected is not None:
        found = module_form.tensors_to_save(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


# --- what happens to files -------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn, files: Files) -> Files:
    """Some files with bits flipped, cut, overwritten, lengthened, removed, or exchanged."""
    damaged = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        data = bytearray(damaged.get(name, b""))
        # half of the time in the first kilobyte: that is where headers are
        where = draw(st.one_of(st.integers(0, max(0, min(len(data), 1024) - 1)), st.integers(0, max(0, len(data) - 1))))
        kind = draw(st.sampled_from(["flip", "cut", "overwrite", "insert", "remove", "exchange", "length"]))
        if kind == "flip" and data:
            data[where] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[where:]
        elif kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=16))
            data[where : where + len(new)] = new
        elif kind == "insert":
            data[where:where] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "length":
            data[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        elif kind == "exchange":
            other = draw(st.sampled_from(sorted(files)))
            damaged[other], data = bytes(data), bytearray(damaged.get(other, b""))
        damaged[name] = bytes(data)
        if kind == "remove":
            damaged.pop(name)
    return damaged


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files(saved: tuple[Files, dict[str, Tensor]], data: st.DataObject) -> None:
    files, tensors = saved
    check(data.draw(damage(files)), tensors, load_modules)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_and_the_graph_form(saved: tuple[Files, dict[str, Tensor]], data: st.DataObject) -> None:
    check(data.draw(damage(saved[0])), None, load_graph)


def test_exchanged_shards_of_equal_size(saved: tuple[Files, dict[str, Tensor]]) -> None:
    """Under each other's names, and those of another model under their own."""
    files, _ = saved
    first, second = [name for name in files if "-of-" in name][:2]
    with pytest.raises(ValueError, match=f"({first}|{second}) (lacks|is truncated|is altered)"):
        check_raises(files | {first: files[second], second: files[first]})
    other = quantize_modules(tiny_pipeline(seed=1, layers=1, width=64).transformer, "w4a6")
    with tempfile.TemporaryDirectory() as name:
        other.save_pretrained(f"{name}/t", max_shard_size="50KB")
        foreign = (Path(name) / "t" / first).read_bytes()
    assert len(foreign) == len(files[first])
    with pytest.raises(ValueError, match=rf"{first}: tensor \S+ was altered since it was saved"):
        check_raises(files | {first: foreign})


def check_raises(files: Files) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        load_modules(name)


# --- headers and configs that lie, with checksums that fit -----------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *paths(value, (*prefix, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_lying_headers(saved: tuple[Files, dict[str, Tensor]], data: st.DataObject) -> None:
    files, tensors = saved
    name = data.draw(st.sampled_from([name for name in files if name.endswith(".safetensors")]))
    raw = files[name]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    put(header, data.draw(st.sampled_from(paths(header))), data.draw(JSON))
    new = json.dumps(header).encode()
    lying = len(new).to_bytes(8, "little") + new + raw[8 + length :]
    check(files | {name: lying}, tensors, load_modules)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_lying_configs(saved: tuple[Files, dict[str, Tensor]], data: st.DataObject) -> None:
    """Whoever changes a config can also bring its checksum up to date; what then loads, loads without harm."""
    files, _ = saved
    config = json.loads(files["config.json"])
    record = config["quantization_config"]
    few = {key: value for key, value in record.items() if key not in ("tensors", "layers")}
    places = paths(few) + data.draw(st.permutations(paths(record)))[:20]
    put(record, data.draw(st.sampled_from(places)), data.draw(JSON))
    config |= record["model"] if isinstance(record.get("model"), dict) else {}
    record["sha256"] = digest({key: value for key, value in record.items() if key != "sha256"})
    check(files | {"config.json": json.dumps(config).encode()}, None, load_modules)


# --- memory ----------------------------------------------------------------------------------------------------------

BOMBS = """
import json, os, resource, shutil, sys
from pathlib import Path
from fp4dit_ao.checkpoint.quantization_record import digest
from fp4dit_ao.checkpoint.tensor_files import INDEX
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
original, work = Path(sys.argv[1]), Path(sys.argv[2])
load_modules(original)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
weights = sorted(original.glob("*.safetensors"))[0].name

def lie(path, change):
    config = json.loads(path.read_text())
    change(config)
    record = config["quantization_config"]
    record["sha256"] = digest({k: v for k, v in record.items() if k != "sha256"})
    path.write_text(json.dumps(config))

def sparse(name):
    return lambda folder: os.truncate(folder / name, 1 << 40)

def deep(name):
    return lambda folder: (folder / name).write_text("[" * 10**7)

def header(length):
    def change(folder):
        with (folder / weights).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
    return change

def config(**change):
    def apply(folder):
        lie(folder / "config.json", lambda c: (c.update(change), c["quantization_config"]["model"].update(change)))
    return apply

def shape(*sizes):
    def apply(folder):
        lie(folder / "config.json", lambda c: c["quantization_config"]["tensors"]["proj_out.weight"].update(shape=sizes))
    return apply

bombs = [
    sparse(weights), sparse("config.json"), sparse(INDEX), deep("config.json"), deep(INDEX),
    header(10**8), header(2**63), header(2**64 - 1),
    config(num_layers=10**9), config(sample_size=10**5), config(cross_attention_dim=2**40), config(num_attention_heads=2**40),
    shape(2**40), shape(2**30, 2**30, 2**30), shape(*[2**47] * 64),
]
refused = 0
for number, bomb in enumerate(bombs):
    folder = work / str(number)
    shutil.copytree(original, folder)
    bomb(folder)
    for load in (load_graph, load_modules):
        try:
            load(folder)
        except ValueError as error:
            assert "\\n" not in str(error), error
            refused += 1
    shutil.rmtree(folder)
print(refused, "refused of", 2 * len(bombs))
"""


def test_bombs(saved: tuple[Files, dict[str, Tensor]], tmp_path: Path) -> None:
    """Under a limit of a gigabyte on top of what the libraries take."""
    (tmp_path / "t").mkdir()
    for name, data in saved[0].items():
        (tmp_path / "t" / name).write_bytes(data)
    arguments = [sys.executable, "-c", BOMBS, str(tmp_path / "t"), str(tmp_path / "work")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # a graph does not make the table of positions that sample_size asks for
    assert done.stdout.strip() == "29 refused of 30"


PEAKS = """
import sys
from pathlib import Path
import diffusers
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
small, large = sys.argv[1:]
loads = [load_modules, diffusers.PixArtTransformer2DModel.from_pretrained, load_graph]
for load in loads:
    load(small)
    def status(key):
        return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) << 10
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = load(large)
    print(status("VmHWM") - before)
    del model
"""


def test_loading_never_holds_a_float_copy(tmp_path: Path) -> None:
    """Peak memory while loading: the file's pages and the tensors, and far less than the float weights would take."""
    from diffusers import PixArtTransformer2DModel

    def save(heads: int, folder: Path) -> int:
        model = PixArtTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            cross_attention_dim=64 * heads, caption_channels=128, use_additional_conditions=False,
        )  # fmt: skip
        float_bytes = sum(p.nbytes for p in model.parameters())
        everything = QuantConfig(skip=(), indivisible="keep", pre_gelu_weight=None)
        quantize_modules(model, everything).save_pretrained(folder)
        return float_bytes

    save(2, tmp_path / "small")
    float_bytes = save(16, tmp_path / "large")
    stored = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert float_bytes > 6 * stored
    arguments = [sys.executable, "-c", PEAKS, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 3
    for peak in peaks:  # the file's pages, the tensors, and what the libraries do besides
        assert peak < 2 * stored + 24e6 < float_bytes / 2
    shutil.rmtree(tmp_path / "large")
