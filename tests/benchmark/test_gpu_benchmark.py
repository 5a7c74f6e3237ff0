"""The GPU benchmark's plumbing, on whatever there is: numbers are not looked at, what is done with them is."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_linear_is_measured_and_what_fails_is_said() -> None:
    result = gpu.measure(16, 48, 256, DEVICE, rounds=2)
    assert set(result["seconds"]) | set(result["failed"]) == set(gpu.variants(16, 48, 256, DEVICE))
    assert {gpu.BASE, "ours, packed", "ours, int8"} <= set(result["seconds"])
    assert all(len(taken) == 2 and min(taken) > 0 for taken in result["seconds"].values())
    assert result["difference"]["ours, packed"] < 2**-8
    json.dumps(result)
    if DEVICE == "cpu":
        assert "ours, packed fp8" in result["failed"]  # Triton has no CPU
    table = gpu.gemm_table([result])
    assert "| 48 x 256" in table
    assert all(f"{name} failed: " in table for name in result["failed"])


def test_ratios_are_to_cublas() -> None:
    result = {
        "out_features": 1000, "in_features": 1000, "tokens": 500, "failed": {"_int_mm": "RuntimeError: no"},
        "seconds": {gpu.BASE: [2e-3, 2e-3, 9e-3], "ours, packed": [1e-3, 1e-3, 7e-3]},
    }  # fmt: skip
    cells = [cell.strip() for cell in gpu.gemm_table([result]).splitlines()[2].strip("|").split("|")]
    assert cells == ["1000 x 1000", "500", "2.00", "failed", "2000", "1"]


@torch.no_grad()
def test_a_step_is_measured_and_stops_in_time(monkeypatch) -> None:
    result = gpu.step(1, 32, 1, DEVICE, until=0)
    assert set(result["skipped"].values()) == {"no time left"}
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = gpu.step(1, 32, 2, DEVICE, until=float("inf"))
    assert not result["skipped"]
    assert result["bytes"]["w4a6 packed, compiled"] < result["bytes"]["w4a6 int8, compiled"]
    assert result["bytes"]["w4a6 int8, compiled"] < result["bytes"]["bfloat16, compiled"]
    table = gpu.step_table(result)
    assert len(table.splitlines()) == 5
    assert "| bfloat16, compiled    | 1.00" in table
    json.dumps(result)


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "benchmarks.gpu measures an NVIDIA GPU, and this machine has none" in run.stderr
    assert "Traceback" not in run.stderr
