"""The GPU benchmark's plumbing, on whatever there is: numbers are not looked at, what is done with them is."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from benchmarks.gpu import attention, command, decode, device_tests, linears, measuring, reconstruction, step
from benchmarks.gpu.measuring import Run, ratios
from fp4dit_ao import AdaRoundConfig, capture, quantizer_for, reconstruct
from fp4dit_ao.benchmark.transformers import PIXART_XL
from tests.cuda_rules import GPU, on_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 64}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "gpu.json", {}, rounds=2, device=DEVICE)


def written(run: Run) -> dict:
    return json.loads(run.out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kind", "make"), [("product", linears.products), ("grouped", linears.grouped_products)])
def test_products_are_measured_and_what_fails_is_said(run: Run, kind: str, make: Callable[..., object]) -> None:
    result = linears.one(kind, 16, 48, 256, run)
    assert set(result["seconds"]) | set(result["failed"]) == set(make(16, 48, 256, DEVICE))
    assert {linears.BASE, "ours, int8"} <= set(result["seconds"])
    assert all(len(taken) == 2 and min(taken) > 0 for taken in result["seconds"].values())
    other = "ours, packed" if kind == "grouped" else "ours, FP8"
    assert result["difference"][other] < 2**-8
    json.dumps(result)
    if DEVICE == "cpu":
        without_triton = {"ours, packed fp8"} if kind == "grouped" else set()
        assert without_triton <= set(result["failed"])
    table = linears.table([result])
    assert "| 48 x 256" in table
    assert all(f"{name} failed: " in table for name in result["failed"])


def test_a_slow_compiler_costs_one_row() -> None:
    with pytest.raises(TimeoutError, match="not ready after 0 s"), measuring.within(0.1):
        time.sleep(30)
    with measuring.within(0.1):
        pass
    time.sleep(0.2)


def test_runs_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that measures waits for one that prepares."""
    monkeypatch.setattr(measuring, "LOCK", tmp_path / "lock")
    told: list[str] = []

    def measuring_alone() -> None:
        with measuring.preparing() as lock, measuring.alone(lock):
            told.append("measured")

    with measuring.preparing() as mine:
        other = threading.Thread(target=measuring_alone)
        other.start()
        time.sleep(0.3)
        told.append("prepared")
        with measuring.alone(mine):
            told.append("measured")
    other.join(timeout=30)
    assert told == ["prepared", "measured", "measured"]


def test_decoding_is_exact_and_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"small": [(48, 256)]})
    decode.measure(run)
    (result,) = written(run)["decode"]
    assert result["exact"] == {"E4M3": True, "int8": True}
    assert set(result["seconds"]) == {decode.BASE, "E4M3", "int8"}
    seconds = {decode.BASE: [1e-5], "E4M3": [1e-6], "int8": [2e-6]}
    told = {"out_features": 1000, "in_features": 1000, "exact": {"E4M3": True}, "seconds": seconds}
    assert decode.row(told) == ["1000 x 1000", "no", "1.0", "2.0", "1.50", "10.0%"]


def test_whole_linears_are_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = linears.one("whole", 16, 48, 256, run)
    assert {linears.BASE, *linears.RECIPES} <= set(result["seconds"])
    json.dumps(result)


def test_the_telling_linears_come_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def one(kind: str, rows: int, features: int, depth: int, run: Run) -> dict:
        seen.append((kind, rows, features, depth))
        if len(seen) == 7:
            run.until = time.monotonic()
        return {
            "seconds": {"bfloat16": [2.0], "w4a6": [1.0]},
            "failed": {},
            "out_features": 1,
            "in_features": 1,
            "tokens": 1,
        }

    monkeypatch.setattr(linears, "one", one)
    linears.measure(run)
    assert seen[:4] == [
        ("product", 4096, *shape) for shape in [(12288, 3072), (3072, 12288), (3072, 3072), (4608, 1152)]
    ]
    assert seen[6:] == [("product", 16384, 12288, 3072)]
    assert len(run.skipped) == 3 * len(linears.TOKENS) * 12 - 7
    assert len(written(run)["linears"]) == 7


def test_block_wise_scales_have_the_layout_that_pytorch_takes() -> None:
    """F.scaled_mm accepts their shapes and strides on fake tensors; it does not compute block-wise scales on a CPU."""
    rows, features, depth = 32, 48, 512
    tokens, levels, token_scale, scale = on_gpu(
        torch.empty(rows, depth, dtype=torch.float8_e4m3fn), torch.empty(features, depth, dtype=torch.float8_e4m3fn),
        torch.empty(rows, 1), torch.empty(features, depth // 128, dtype=torch.float16),
    )  # fmt: skip
    with GPU, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
        x_scale, w_scale = linears.block_wise_scales(token_scale, scale, depth)
        assert (x_scale.shape, x_scale.stride()) == ((rows, 4), (1, rows))
        assert linears.block_wise_product(tokens, levels, x_scale, w_scale).shape == (rows, features)


def test_ratios_are_to_cublas() -> None:
    result = {
        "out_features": 1000, "in_features": 1000, "tokens": 500, "failed": {"_int_mm": "RuntimeError: no"},
        "seconds": {linears.BASE: [2e-3, 2e-3, 9e-3], "ours, packed": [1e-3, 1e-3, 7e-3]},
    }  # fmt: skip
    cells = [cell.strip() for cell in linears.table([result]).splitlines()[2].strip("|").split("|")]
    assert cells == ["1000 x 1000", "500", "2.00", "failed", "2000", "1"]
    assert ratios(result["seconds"], linears.BASE) == {linears.BASE: 1.0, "ours, packed": 2.0}


@torch.no_grad()
def test_a_step_is_measured_and_stops_in_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PIXART_XL", PIXART_XL | SMALL)
    model, given = step.pixart(DEVICE, layers=1, pixels=64)
    monkeypatch.setattr(step, "variants", lambda: [("bfloat16", None), ("w4a6_codebook", None), ("bfloat16", "cuDNN")])
    result = step.steps(model, given, run, mode="eager")
    assert {"bfloat16", "w4a6_codebook"} <= set(result["seconds"])
    assert set(result["skipped"]) <= {"bfloat16, cuDNN attention"}
    assert result["bytes"]["w4a6_codebook"] < result["bytes"]["bfloat16"]
    assert "| bfloat16 " in step.table(result)
    json.dumps(result)
    run.until = time.monotonic()
    assert set(step.steps(model, given, run, mode="eager")["skipped"].values()) == {"no time left"}


@torch.no_grad()
def test_flux_has_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_attention_heads": 1, "joint_attention_dim": 96, "pooled_projection_dim": 64, "num_layers": 1}
    model, given = step.flux(DEVICE, pixels=64, config=step.FLUX | small | {"num_single_layers": 1})
    assert model(**given)[0].isfinite().all()
    assert step.FLUX["num_attention_heads"] * step.FLUX["attention_head_dim"] == 3072


def test_attention_is_compared_with_the_best_backend(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda attend: attend)
    monkeypatch.setattr(attention, "CASES", {"small": (1, 2, 16, 16, 64)})
    attention.measure(run)
    (result,) = written(run)["attention"]
    assert {attention.DEFAULT, "ours, E2M3 q, k and v"} <= set(result["seconds"])
    row = attention.row("x", {attention.DEFAULT: [2e-6], "cuDNN": [1e-6], "ours, E2M3 q, k and v": [0.5e-6]})
    assert row == ["x", "2.00", "failed", "failed", "4.00", "cuDNN", "1"]


def test_reconstruction_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "PIXART_XL", PIXART_XL | SMALL)
    how = reconstruction.How({"bfloat16": True}, True, 4)
    broken = how._replace(settings={"bfloat16": True, "scope": "none"})
    monkeypatch.setattr(reconstruction, "VARIANTS", {"broken": broken, "bfloat16": how})
    with torch.no_grad():
        reconstruction.measure(run, layers=2, pixels=64, samples=2)
    (row,) = written(run)["reconstruction"]
    assert row["variant"] == "bfloat16"
    assert len(row["seconds"]) == 2 * (4 - 2)  # two of four iterations warm up
    assert [error["row"] for error in written(run)["errors"]] == ["broken"]
    told = {"seconds": [0.04], "around": [30.0, 2.0], "memory": 2**31, "errors": [[1e-3, 5e-4]], "roofline": 0.1}
    assert reconstruction.whole(told) == 28 * 2500 * 0.04 + 30 + 27 * 2
    assert "| 40.0 " in reconstruction.table({"x": told})
    assert "| 10.0% " in reconstruction.table({"x": told})


def test_the_operations_of_an_iteration_are_those_that_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations more on one block, four rows each; attention as two products, of which the backward pass makes four."""
    config = PIXART_XL | SMALL
    given = step.sample(64, torch.float32, config)
    model = step.random_model(config | {"num_layers": 1}, 64, torch.float32)
    counts = []
    for iterations in (1, 3):
        prepared = prepare_pt2e(capture(model, given), quantizer_for(model, "w4a6"))
        settings = AdaRoundConfig(iters=iterations, batch_size=4)
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            reconstruct(prepared, [given, given], settings, progress=False)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * reconstruction.products(4, 64, config)


def test_tests_are_run_one_file_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file printed is summed up; one that does not end in time is said to."""

    def ended(command: list[str], timeout: float, **_: object) -> subprocess.CompletedProcess:
        if command[-1].endswith("slow.py"):
            raise subprocess.TimeoutExpired(command, timeout, b"..")
        output = "..F\nFAILED tests/a.py::b - AssertionError\nPython 3.12\n=== 1 failed, 2 passed in 0.1s ===\n"
        return subprocess.CompletedProcess(command, 1, output, "")

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(device_tests, "FILES", ("tests/a.py", "tests/slow.py"))
    device_tests.measure(run)
    first, second = written(run)["tests"]
    assert (first["result"], first["failed"]) == (
        "1 failed, 2 passed in 0.1s",
        ["FAILED tests/a.py::b - AssertionError"],
    )
    assert second["result"] == "not finished when the time was over"


@pytest.mark.parametrize("name", device_tests.FILES)
def test_the_tests_for_gpus_exist(name: str) -> None:
    path, _, test = name.partition("::")
    assert f"def {test}" in (device_tests.ROOT / path).read_text(encoding="utf-8")


def test_parts_are_named() -> None:
    assert command.parts_of("step, linears") == ["step", "linears"]
    with pytest.raises(typer.BadParameter, match="unknown part 'speed'; choose among tests,decode,linears,step,"):
        command.parts_of("tests,speed")


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.gpu measures an NVIDIA GPU, and this machine has none"):
        command.main(part="tests")
