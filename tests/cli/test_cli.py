"""The command line: what works on a small pipeline, and wrong input, each case one sentence, non-zero, nothing left behind."""

import errno
import functools
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from typer.testing import CliRunner

import fp4dit_ao
from fp4dit_ao import FP4DiTConfig, QuantizedTransformer, quantize_modules, quantize_pipeline, quantizer_for
from fp4dit_ao.cli.app import app
from fp4dit_ao.cli.call_options import call_options
from fp4dit_ao.cli.commands.quantize import quantize
from fp4dit_ao.config import DEFAULT_RECIPE
from fp4dit_ao.diffusers_integration import named_models, weight_forms
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.evaluation import fidelity
from fp4dit_ao.evaluation.layer_speed import layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import attention, pick
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.util import tensor_state
from fp4dit_ao.util.locks import only_process
from fp4dit_ao.util.user_cache import VARIABLE
from tests.evaluation.tiny_judges import tiny_dino
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float pipeline and a prompt file; the quantized pipeline is made by the first test that wants it."""
    root = tmp_path_factory.mktemp("cli")
    tiny_pipeline().save_pretrained(root / "float")
    (root / "float" / "generation.json").write_text(json.dumps(CALL))
    (root / "prompts.txt").write_text("red cat\nblue dog\n\ngreen tree\n")
    return root


@pytest.fixture(scope="module")
def quantized(folders):
    result = run(
        "quantize",
        folders / "float",
        "--recipe",
        "w4a6",
        "--rounding",
        "nearest",
        "--prompts",
        folders / "prompts.txt",
        "--out",
        folders / "q",
    )
    assert result.exit_code == 0, result.output
    return folders / "q"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spy(function, first):
    """``function``, which appends its first argument to ``first``."""
    return lambda *arguments, **options: first.append(arguments[0]) or function(*arguments, **options)


def refused(result, *words):
    """One sentence on stderr that holds ``words``, exit status 1, no traceback."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("fp4dit-ao: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


def entries(folder):
    return {path.relative_to(folder) for path in Path(folder).rglob("*")}


# --- what works ------------------------------------------------------------------------------------------------------


def test_help_is_there_at_once():
    start = time.perf_counter()
    code = (
        "import sys; from fp4dit_ao.cli.app import app; app(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10  # a loaded machine; what matters is that torch stays out:
    assert found.stdout.splitlines()[-1] == "False"
    for command in ("demo", "quantize", "generate", "evaluate", "inspect", "benchmark", "export", "serve"):
        assert command in found.stdout
        assert run(command, "--help").exit_code == 0


def test_the_command_and_the_api_have_one_default_recipe():
    """The command's module cannot import it: that would load torch."""
    named = [
        inspect.signature(function).parameters["recipe"].default
        for function in (quantize, quantize_pipeline, quantize_modules, quantizer_for, FP4DiTConfig)
    ]
    assert set(named) == {DEFAULT_RECIPE}


def test_quantize_says_what_it_did(quantized):
    assert not quantized.with_name("q.unfinished").exists()
    assert json.loads((quantized / "generation.json").read_text())["height"] == 32
    assert not list(quantized.rglob("*.bin"))


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        (["--iters", 2], "| transformer_blocks.1 |"),
        (["--rounding", "gptq"], "| transformer_blocks.1 |"),
        (
            ["--rounding", "adaround", "--scope", "window", "--iters", 2],
            "| transformer_blocks.0 … transformer_blocks.1 |",
        ),
    ],
    ids=["default", "gptq", "window"],
)
def test_rounding_on_data_leaves_a_report(folders, method, unit):
    out = folders / "-".join(map(str, method))
    result = run(
        "quantize", folders / "float", *method, "--samples", 4, "--recipe", "w4a8", "--skip", "*attn2*",
        "--prompts", folders / "prompts.txt", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert unit in (out / "reconstruction.md").read_text()
    assert not out.with_name(out.name + ".unfinished").exists()
    kept = run("inspect", out, "--no-measure").stdout
    assert re.search(r"attn2\.to_q .*name matches '\*attn2\*'", kept)


def test_quantize_tells_both_sizes(folders, tmp_path):
    """As stored, which is what the disk holds, and with 16 bits for what is not quantized, as reports have it."""
    call = ["--prompts", folders / "prompts.txt", "--out", tmp_path / "q", "--rounding", "nearest", "--recipe", "w4a6"]
    said = run("quantize", folders / "float", *call).stdout
    found = re.search(
        r"transformer: (\S+) MB → (\S+) MB as stored, 4.25 bits per quantized weight and the rest in float32; "
        r"with 16 bits for that, (\S+) MB → (\S+) MB",
        said,
    )
    assert found, said
    before, after, halved, at_16_bits = map(float, found.groups())
    files = [next((path / "transformer").glob("*.safetensors")) for path in (folders / "float", tmp_path / "q")]
    assert [before, after] == pytest.approx(
        [file.stat().st_size / 1e6 for file in files], abs=0.03
    )  # headers are not counted
    assert halved == pytest.approx(before / 2, abs=0.01)
    assert at_16_bits < after


def test_generate_compares(quantized, folders, tmp_path):
    result = run(
        "generate",
        quantized,
        "--prompt",
        "cat",
        "--prompt",
        "dog",
        "--compare",
        folders / "float",
        "--out",
        tmp_path / "x.png",
    )
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.stdout
    assert Image.open(tmp_path / "x.png").width > 2 * 128
    alone = run("generate", quantized, "--prompt", "cat", "--out", tmp_path / "y.png", "--steps", 1)
    assert alone.exit_code == 0, alone.output


def test_call_options_reach_the_pipeline(folders, tmp_path):
    call = ["--call", "height=64", "--call", "width=32", "--call", "guidance_scale=1", "--call", "negative_prompt=red"]
    drawn = run("generate", folders / "float", "--prompt", "cat", "--out", tmp_path / "x.png", "--steps", 1, *call)
    assert drawn.exit_code == 0, drawn.output
    picture = Image.open(tmp_path / "x.png")
    assert picture.height > 256 > picture.width - 130  # a tall image, four times as large
    out = tmp_path / "e.json"
    run(
        "evaluate", folders / "float", "--against", folders / "float", "--prompts", folders / "prompts.txt", "--count", 2,
        "--seeds", 1, "--steps", 1, "--call", "height=64", "--out", out,
    )  # fmt: skip
    assert json.loads(out.read_text())["settings"]["height"] == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--call", "height"], ["NAME=VALUE"]),
        (["--call", "prompt=x"], ["--prompt"]),
        (["--call", "num_inference_steps=3"], ["--steps"]),
        (["--call", "width=32", "--call", "width=64"], ["width", "twice"]),
        (["--call", "heigth=64"], ["PixArtSigmaPipeline takes no argument heigth"]),
    ],
)
def test_calls_that_are_refused(folders, tmp_path, options, words):
    refused(run("generate", folders / "float", "--prompt", "cat", "--out", tmp_path / "x.png", *options), *words)


def test_call_options_are_json_or_text():
    options = ["a=512", "b=1.5", "c=true", "d=[1, 2]", "e=blurry, low quality", "f=", "g=null", "h=x=y"]
    assert call_options(options, 3) == {
        "a": 512, "b": 1.5, "c": True, "d": [1, 2], "e": "blurry, low quality", "f": "", "g": None, "h": "x=y",
        "num_inference_steps": 3,
    }  # fmt: skip


def test_a_recipe_is_changed_as_a_whole_and_layer_by_layer(folders, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"weight": "nf4", "pre_gelu_weight": None, "group_size": 32}))
    result = run(
        "quantize", folders / "float", "--rounding", "nearest", "--prompts", folders / "prompts.txt", "--out", tmp_path / "q",
        "--config", tmp_path / "recipe.json", "--group-size", 64, "--dtype", "bfloat16",
        "--layer", "*.attn1.*=none", "--layer", "*.0.attn1.to_q=int_w4a8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    weights = dict(load_graph(tmp_path / "q" / "transformer").graph.named_parameters())
    block = {name.removeprefix("transformer_blocks.0."): weight for name, weight in weights.items() if ".0." in name}
    assert (block["ff.net.0.proj.weight"].fmt, block["ff.net.0.proj.weight"].block_size) == ("nf4", [1, 64])
    assert block["attn1.to_q.weight"].fmt == "nf4"  # the file's weight holds for every recipe
    assert block["attn1.to_k.weight"].dtype == torch.bfloat16
    assert type(block["attn1.to_k.weight"].detach()) is torch.Tensor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "blocks.0"], ["GLOB=RECIPE"]),
        (["--layer", "*=w4a7"], ["unknown recipe 'w4a7'"]),
        (["--config", "prompts.txt"], ["prompts.txt", "not valid JSON"]),
        (["--config", "list.json"], ["JSON object"]),
        (["--config", "typo.json"], ["no field 'grup_size'", "group_size"]),
        (["--config", "wrong.json"], ["group_size"]),
        (["--config", "none.json"], ["cannot read none.json", "No such file"]),
        (["--dtype", "float8"], ["unknown dtype 'float8'", "bfloat16"]),
    ],
)
def test_changes_of_a_recipe_that_are_refused(folders, tmp_path, options, words):
    (folders / "list.json").write_text("[1]")
    (folders / "typo.json").write_text('{"grup_size": 32}')
    (folders / "wrong.json").write_text('{"group_size": "many"}')
    options = [str(folders / option) if (folders / option).is_file() else option for option in options]
    call = ["--prompts", folders / "prompts.txt", "--out", tmp_path / "q", "--rounding", "nearest"]
    refused(run("quantize", folders / "float", *call, *options), *words)
    assert not entries(tmp_path)


def test_versions_are_told():
    found = run("--version")
    assert found.exit_code == 0 and found.stdout.startswith(f"fp4dit-ao {fp4dit_ao.__version__} (torch ")


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        (torch.bfloat16, "stored", torch.bfloat16),
        (torch.float16, "stored", torch.float32),  # CPUs are slow at it
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_pipelines_are_loaded_as_they_are_stored(tmp_path, stored, asked, loaded):
    tiny_pipeline(layers=1).to(stored).save_pretrained(tmp_path / "p")
    pipe = named_models.open_pipeline(str(tmp_path / "p"), "cpu", dtype=asked)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {loaded}


def test_generate_compares_packed_weights_with_bytes(quantized, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("fp4dit_ao.evaluation.fidelity.generate", spy(fidelity.generate, loaded))
    result = run(
        "generate", quantized, "--weights", "fp8", "--compare", quantized, "--prompt", "cat", "--device", "cpu",
        "--out", tmp_path / "x.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    packed, fast = (pipe.transformer.nbytes() for pipe in loaded)
    assert packed < fast
    psnr = float(re.search(r"\| cat +\| ([0-9.]+) ", result.stdout)[1])
    assert psnr > 20  # all that differs is the order of sums, in a model of random weights
    assert Image.open(tmp_path / "x.png").width > 2 * 128


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ("q", "int4", ["unknown weights 'int4'", "packed, int8, fp8"]),
        ("float", "int8", ["float was not quantized by fp4dit-ao", "to turn into int8"]),
    ],
)
def test_weights_that_a_model_has_not_are_refused_before_anything_is_drawn(
    quantized, folders, tmp_path, model, weights, words
):
    result = run(
        "generate", folders / model, "--weights", weights, "--compare", quantized, "--prompt", "cat",
        "--out", tmp_path / "x.png",
    )  # fmt: skip
    refused(result, *words)
    assert not entries(tmp_path)


def test_a_quantized_pipeline_on_the_hub_is_as_good_as_its_folder(quantized, tmp_path, monkeypatch):
    def downloaded(name, file=""):
        if name != "me/q":
            raise LocalEntryNotFoundError("offline")
        return str(quantized / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    assert run("inspect", "me/q", "--no-measure").stdout == run("inspect", quantized, "--no-measure").stdout
    loaded = []
    monkeypatch.setattr("fp4dit_ao.evaluation.fidelity.generate", spy(fidelity.generate, loaded))
    for model in (quantized, "me/q"):
        result = run(
            "generate", model, "--weights", "int8", "--prompt", "cat", "--device", "cpu", "--out", tmp_path / "x.png"
        )
        assert result.exit_code == 0, result.output
    first, second = (pipe.transformer for pipe in loaded)
    assert type(first) is type(second) is QuantizedTransformer
    assert first.nbytes() == second.nbytes()
    refused(run("inspect", "me/other"), "me/other is not quantized by fp4dit_ao")


def test_block_formats_have_no_weights_to_unpack(tmp_path):
    pipe = quantize_pipeline(
        tiny_pipeline(layers=1), "mxfp4", prompts=["a cat"], rounding="nearest", progress=False, **CALL
    )
    pipe.save_pretrained(tmp_path / "q")
    result = run("generate", tmp_path / "q", "--weights", "int8", "--prompt", "cat", "--out", tmp_path / "x.png")
    refused(result, "no packed weight to unpack", "mxfp4")


def test_evaluate_prints_a_table_and_writes_json(quantized, folders, tmp_path, monkeypatch):
    out, dino = tmp_path / "e.json", tiny_dino(tmp_path / "tiny-dino")
    arguments = [
        "evaluate", quantized, "--against", folders / "float", "--prompts", folders / "prompts.txt", "--seeds", 2,
        "--out", out,
    ]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith(("| float", "| q "))]
    assert "identical" in rows[0] and "identical" not in rows[1] and "batch size 3" in rows[2]
    data = json.loads(out.read_text())
    assert data["settings"]["steps"] == 2
    assert len(data["variants"][1]["psnr"]) == 2
    assert len(data["variants"][1]["psnr"][0]) == 3
    assert len(list((tmp_path / "e_images").rglob("*.png"))) == 3 * 6
    assert "red cat" in out.with_suffix(".html").read_text()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pipeline was opened")

    monkeypatch.setattr(named_models, "open_pipeline", refuse)
    again = run(*arguments, "--metric", f"dino={dino}", "--metric", f"kid={dino}", "--real", tmp_path / "e_images")
    assert again.exit_code == 0, again.output
    head = next(line for line in again.stdout.splitlines() if "PSNR" in line)
    for title in ("DINO (tiny-dino)", "KID x 1000 (tiny-dino) to original", "KID x 1000 (tiny-dino) to real images"):
        assert title in head
    new = json.loads(out.read_text())
    assert [row["psnr"] for row in new["variants"]] == [row["psnr"] for row in data["variants"]]
    assert 0 < new["variants"][1]["scores"]["DINO (tiny-dino)"][0][0] <= 1


def test_evaluate_shares_images_out(folders, tmp_path):
    arguments = [
        "evaluate", folders / "float", "--against", folders / "float", "--prompts", folders / "prompts.txt", "--seeds", 2,
        "--seeding", "same", "--first-seed", 42, "--baseline", "none", "--batch-size", 2,
    ]  # fmt: skip
    part = run(*arguments, "--shard", "1/3", "--out", tmp_path / "part.json")
    assert part.exit_code == 0, part.output
    assert "part 2 of 3" in part.stdout and not (tmp_path / "part.json").exists()
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "part_images").rglob("*.png")}
    assert sorted(drawn) == ["000-000002.png", "001-000000.png"]
    whole = run(*arguments, "--devices", "cpu,cpu", "--out", tmp_path / "whole.json")
    assert whole.exit_code == 0, whole.output
    found = {path.name: path.read_bytes() for path in (tmp_path / "whole_images").rglob("*.png")}
    assert len(found) == 6
    assert found | drawn == found  # the same bits in another process
    assert json.loads((tmp_path / "whole.json").read_text())["settings"]["seeding"] == "same"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "3/3"], ["--shard 3/3 is not K/N", "--shard 0/4"]),
        (["--device", "cpu", "--devices", "cpu,cpu"], ["--device or --devices"]),
        (["--metric", "clop"], ["unknown metric 'clop'"]),
        (["--baseline", "size"], ["unknown --baseline 'size'", "batch, compiled, kernel"]),
        (["--seeding", "odd"], ["unknown seeding 'odd'"]),
        (["--sample", "last"], ["unknown --sample 'last'", "first, shuffled"]),
        (["--prompt-set", "coco"], ["no file of the prompt set coco", "captions_val2014.json"]),
    ],
)
def test_evaluations_that_are_refused(folders, tmp_path, options, words):
    arguments = ["evaluate", folders / "float", "--against", folders / "float", "--prompts", folders / "prompts.txt"]
    refused(run(*arguments, "--out", tmp_path / "e.json", *options), *words)
    assert not list(tmp_path.rglob("*.png"))


def test_inspect_says_formats_errors_and_reasons(quantized, folders, tmp_path):
    result = run(
        "inspect", quantized, "--against", folders / "float", "--picture", tmp_path / "levels.png", "--no-measure"
    )
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if "transformer_blocks.0.ff.net.0.proj" in line)
    assert "e3m0" in row
    assert "0.0%" in row
    assert "recipe keeps 'proj_out*'" in result.stdout
    assert "4.25 bits per quantized weight" in result.stdout
    assert Image.open(tmp_path / "levels.png").width > 200


def test_inspect_names_the_units_that_run_on_this_machine(quantized, monkeypatch):
    def units() -> dict[str, str]:
        result = run("inspect", quantized, "--device", "cpu", "--no-measure")
        assert result.exit_code == 0, result.output
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "|" in line]
        column = rows[0].index("runs on")
        return {row[0]: row[column] for row in rows if len(row) == len(rows[0])}

    feed_forward, attention_layer = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn1"
    found = units()
    assert found[attention_layer].startswith("int8 scores, compiled kernel") == bool(attention.kernels())
    assert found[feed_forward] == str(pick(parse("e3m0"), parse("e2m3"), "cpu"))
    assert ("compiled kernel" in found[feed_forward]) == (native.shared_object() is not None)
    monkeypatch.setattr(native, "shared_object", lambda: None)
    monkeypatch.setattr("fp4dit_ao.kernels.attention.kernels", dict)
    found = units()
    assert found[feed_forward] == "int8, PyTorch operators"
    assert found[attention_layer] == "PyTorch's attention, rounded values"
    assert not any("compiled" in unit for unit in found.values())


def test_inspect_is_a_certificate_for_this_machine(quantized, folders, monkeypatch):
    asked = []

    def measurer(groups, rows, device, seconds):
        asked.append((len(groups[0]), *groups[0][0].shape, rows))
        speed = 0.5 if rows < 100 else 2.0
        return LayerSpeed(1e-3 / speed, 1e-3, speed)

    monkeypatch.setenv(VARIABLE, str(folders / "cache"))
    monkeypatch.setattr(weight_forms, "layer_speeds", functools.partial(layer_speeds, measurer=measurer))
    monkeypatch.setattr("fp4dit_ao.cli.inspect.load_graph", functools.cache(load_graph))

    def rows_and_end(*options):
        result = run("inspect", quantized, "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "|" in line]
        return [dict(zip(rows[0], row, strict=True)) for row in rows if len(row) == len(rows[0])], result.stdout

    rows, text = rows_and_end()
    found = {row["layer"]: row for row in rows}
    wide, text_keys = found["transformer_blocks.0.ff.net.0.proj"], found["transformer_blocks.0.attn2.to_k"]
    assert (wide["tokens"], wide["ms"], wide["speed / bfloat16"]) == ("32", "2", "0.50")
    assert text_keys["tokens"] == "16"
    assert wide["why not faster"]
    assert "at 32 image tokens a call (captured with hidden_states 2×4×8×8;" in text
    assert f"`fp4dit-ao generate {quantized} --weights auto --dtype bfloat16" in text
    assert "No linear of this model is faster than bfloat16 on this machine" in text
    assert {(3, 128, 128, 32), (1, 128, 128, 32)} < set(asked)  # q, k and v of the image together; others alone
    assert len(asked) == len(set(asked)) == 5
    count = len(asked)
    assert rows_and_end()[1] == text and len(asked) == count
    rows, text = rows_and_end("--tokens", 4096)
    found = {row["layer"]: row for row in rows}
    assert found["transformer_blocks.0.ff.net.0.proj"]["tokens"] == "4096"
    assert found["transformer_blocks.0.ff.net.0.proj"]["why not faster"] == ""
    assert found["transformer_blocks.0.attn2.to_k"]["tokens"] == "16"
    assert "quantized linears are slower than bfloat16 here" in text
    asked.clear()
    rows_and_end("--measure-again")
    assert len(asked) == count
    text = rows_and_end("--no-measure")[1]
    assert "image tokens" not in text and "why not faster" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which inspect takes")
def test_inspect_refuses_a_device_that_is_not_there(quantized):
    refused(run("inspect", quantized, "--device", "cuda"), "this machine has no CUDA device; choose 'cpu'")


def test_benchmark_times_in_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute, and is not what is tested
    result = run(
        "benchmark", "--part", "linears", "--linear", "128x128:2,17", "--recipe", "w4a6", "--peer", "none", "--rounds", 2,
        "--out", tmp_path / "b.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "b.json").read_text())
    assert result.stdout.splitlines()[-1] == data["verdict"]
    assert data["verdict"].startswith("On this machine a linear in w4a6 is (median of 2) ")
    variants = {m["variant"]: m for m in data["linears"] if m["case"]["tokens"] == 17}
    quick = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX2"
    ceiling = ["oneDNN int8, prepacked"] if quick else []
    assert list(variants)[: 4 + len(ceiling)] == [
        "torch._int_mm", "float32", "bfloat16", *ceiling, "w4a6, compiled",
    ]  # fmt: skip
    assert all(m["error"] is None and len(m["seconds"]) == 2 for m in variants.values())
    assert len({m["facts"].get("bits") for m in variants.values()} & {4.25, 8.0, 16.0, 32.0}) == 4
    assert "| w4a6, compiled" in result.stdout and "### Bars" in result.stdout
    assert (tmp_path / "b.md").read_text() in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "w3a3"], ["unknown recipe 'w3a3'", "w4a6"]),
        (["--part", "linear"], ["unknown --part 'linear'", "linears"]),
        (["--peer", "nobody"], ["unknown --peer 'nobody'", "SDNQ int8"]),
        (["--linear", "big"], ["unknown linear 'big'", "4608x1152:16,256"]),
        (["--size", "huge"], ["unknown --size 'huge'", "standard"]),
        (["--transformer", "big"], ["unknown step 'big'", "512x28"]),
        (["nowhere"], ["there is no folder nowhere"]),
    ],
)
def test_benchmark_refuses_before_any_work(options, words, tmp_path):
    refused(run("benchmark", *options, "--out", tmp_path / "b.json"), *words)
    assert not entries(tmp_path)


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "w3a3"], ["unknown recipe 'w3a3'", "w4a6"]),
        (["--rounding", "up"], ["unknown rounding 'up'", "nearest", "gptq"]),
        (["--objective", "beauty"], ["unknown objective 'beauty'", "mse"]),
        (["--scope", "world"], ["unknown scope 'world'", "block, layer, window"]),
        (["--rounding", "nearest", "--iters", 3], ["--iters", "--rounding nearest"]),
        (["--rounding", "gptq", "--iters", 3], ["--iters", "--rounding gptq"]),
        (["--rounding", "gptq", "--patience", 3], ["--patience", "--rounding gptq"]),
        (["--prompts", "EMPTY"], ["holds no prompts"]),
        (["--prompts", "ABSENT"], ["there is no prompt file"]),
        (["--prompts", "BINARY"], ["is not UTF-8"]),
        (["--out", "FULL"], ["not empty"]),
        (["--out", "FILE/below"], ["cannot", "FILE"]),
        (["--skip", "no_such_layer"], ["matches no linear or attention"]),
    ],
)
def test_quantize_refuses(folders, tmp_path, options, words):
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.txt").write_text("dear")
    before = entries(tmp_path)
    placed = [tmp_path / o if str(o).isupper() or str(o).startswith("FILE") else o for o in options]
    start = [
        "quantize",
        folders / "float",
        "--prompts",
        folders / "prompts.txt",
        "--out",
        tmp_path / "out",
        "--rounding",
        "nearest",
    ]
    refused(run(*start, *placed), *words)
    assert entries(tmp_path) == before


def test_a_pipeline_without_a_transformer_is_refused(folders, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    result = run("quantize", tmp_path / "unet", "--prompts", folders / "prompts.txt", "--out", tmp_path / "out")
    refused(result, "DDPMPipeline has no transformer")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


def test_a_group_that_does_not_divide_becomes_the_largest_that_does(folders, tmp_path):
    """As ``quantize_pipeline`` does for every family of the table."""
    tiny_pipeline(width=192, layers=1).save_pretrained(tmp_path / "narrow")
    (tmp_path / "narrow" / "generation.json").write_text(json.dumps(CALL))
    result = run(
        "quantize", tmp_path / "narrow", "--prompts", folders / "prompts.txt", "--out", tmp_path / "out",
        "--rounding", "nearest",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    decisions = QuantizedTransformer.from_pretrained(tmp_path / "out" / "transformer").decisions
    sizes = {decision.name: decision.config.group_size for decision in decisions if decision.config}
    assert sizes["transformer_blocks.0.attn1.to_q"] == 96


@pytest.mark.parametrize("model", ["nowhere/at/all", "./nowhere", "nowhere"])
def test_a_model_that_is_not_there_is_refused(model, tmp_path):
    refused(run("generate", model, "--prompt", "cat", "--out", tmp_path / "x.png"), f"there is no folder {model}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    refused(
        run("generate", tmp_path, "--prompt", "cat", "--out", tmp_path / "x.png"), "is no pipeline", "model_index.json"
    )


def test_a_float_pipeline_cannot_be_inspected(folders):
    refused(run("inspect", folders / "float"), "is not quantized by fp4dit_ao")


def test_quantizing_twice_is_refused(quantized, folders, tmp_path):
    result = run("quantize", quantized, "--prompts", folders / "prompts.txt", "--out", tmp_path / "out")
    refused(result, "already quantized")


def test_a_file_is_no_folder_to_write_to(folders, tmp_path):
    (tmp_path / "q").write_text("mine")
    result = run("quantize", folders / "float", "--prompts", folders / "prompts.txt", "--out", tmp_path / "q")
    refused(result, "q is a file")
    assert (tmp_path / "q").read_text() == "mine"


def test_two_runs_into_one_folder_are_refused(folders, tmp_path):
    with only_process(tmp_path / "q"):
        result = run("quantize", folders / "float", "--prompts", folders / "prompts.txt", "--out", tmp_path / "q")
    refused(result, "another process is writing", str(tmp_path / "q"))
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (OSError(errno.ENOSPC, "No space left on device"), 1, ["block-001", "No space left on device", "make room"]),
    ],
    ids=["interrupted", "disk full"],
)
def test_what_is_finished_is_kept_and_the_way_on_is_said(folders, tmp_path, monkeypatch, failure, status, words):
    command = [
        "quantize", folders / "float", "--prompts", folders / "prompts.txt", "--out", tmp_path / "q", "--iters", 2,
        "--samples", 2,
    ]  # fmt: skip
    save, saved = tensor_state.save_file, []

    def fails(*arguments):
        saved.append(arguments)
        if len(saved) == 2:
            raise failure
        save(*arguments)

    monkeypatch.setattr(tensor_state, "save_file", fails)
    result = run(*command)
    assert result.exit_code == status
    said = [line for line in result.stderr.splitlines() if line.startswith("fp4dit-ao: ")]
    assert len(said) == 1
    for word in (*words, str(tmp_path / "q.unfinished"), "--resume"):
        assert word in said[0]
    assert entries(tmp_path / "q.unfinished" / "blocks") == {Path("block-000.safetensors")}
    if status == 130:
        return
    other = run(*command, "--resume", "--seed", 1)
    refused(other, "another run", "--resume", str(tmp_path / "q.unfinished"))
    assert run(*command, "--resume").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"q"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "lots"], ["'lots' is no amount of memory", "such as 8GB"]),
        (["--memory", "8GB", "--fine-tuning", "scales"], ["memory='8GB'", "'scales' trains the whole model"]),
    ],
)
def test_a_limit_of_memory_that_cannot_be_kept_is_refused(folders, tmp_path, options, words):
    command = ["quantize", folders / "float", "--prompts", folders / "prompts.txt", "--out", tmp_path / "q", *options]
    refused(run(*command), *words)
    assert not entries(tmp_path)


def test_an_unfinished_run_is_not_overwritten(folders, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    result = run("quantize", folders / "float", "--prompts", folders / "prompts.txt", "--out", tmp_path / "out")
    refused(result, "--resume")
    assert (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("damage", ["truncated", "altered", "version", "no weights", "no json"])
def test_a_broken_checkpoint_is_refused(quantized, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    config = copy / "transformer" / "config.json"
    weights = next((copy / "transformer").glob("*.safetensors"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "altered":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "version":
        config.write_text(re.sub(r'"format_version": \d+', '"format_version": 999', config.read_text()))
    elif damage == "no weights":
        weights.unlink()
    else:
        config.write_text(config.read_text()[:-20])
    refused(run("generate", copy, "--prompt", "cat", "--out", tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("command", ["generate", "evaluate", "inspect", "demo", "benchmark"])
def test_an_unwritable_place_is_refused_before_any_work(command, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "x"
    arguments = {
        "generate": ["nowhere", "--prompt", "cat", "--out", below],
        "evaluate": ["nowhere", "--against", "reference", "--out", below],
        "inspect": ["nowhere", "--picture", below],
        "demo": ["--out", below],
        "benchmark": ["--out", below],
    }[command]
    refused(run(command, *arguments), "cannot write", "is a file")
    assert (tmp_path / "file").read_text() == ""


def test_prompts_are_asked_for_where_there_are_none_to_take(folders, tmp_path):
    refused(run("quantize", folders / "float", "--out", tmp_path / "out"), "needs prompts", "--prompts FILE")


def test_debug_shows_the_traceback(tmp_path):
    result = run("generate", "nowhere", "--prompt", "cat", "--out", tmp_path / "x.png", "--debug")
    assert isinstance(result.exception, FileNotFoundError)
