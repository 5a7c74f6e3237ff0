"""Part ``tests``: the tests that a GPU enables, those that failed in the first trial first."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.measuring import Run

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/ops/test_ops.py::test_cuda_agrees_with_cpu",
    "tests/kernels/test_few_tokens.py",
    "tests/kernels/test_fp8_attention.py",
    "tests/kernels/test_triton_linear.py",
    "tests/kernels/test_decoded_linear.py",
    "tests/kernels/test_integer_product.py",
    "tests/tensors/test_levels.py",
    "tests/tensors/test_minifloat.py",
    "tests/passes/test_device_placement.py",
    "tests/diffusers_integration/test_module_form.py",
    "tests/passes/reconstruction/test_iteration.py",
    "tests/benchmark/test_gpu_benchmark.py",
)
"""Tests that do more where there is a GPU."""


def measure(run: Run) -> None:
    """Runs each file in a process of its own, and says how it ended."""
    for name in FILES:
        if not run.has_time(name):
            continue
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", name]
        try:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=min(3600.0, max(1.0, run.until - time.monotonic())),
            )
            output = ended.stdout + ended.stderr
        except subprocess.TimeoutExpired as error:
            output = f"{(error.stdout or b'').decode(errors='replace')}\nnot finished when the time was over"
        row = {"tests": name, "seconds": time.monotonic() - began, **summary(output)}
        run.record("tests", row)
        run.say(f"{name}: {row['result']} ({row['seconds']:.0f} s)")
        for line in row["failed"]:
            run.say(f"  {line}")


def summary(output: str) -> dict[str, object]:
    """The last line that counts tests, and a line for each that failed."""
    lines = output.splitlines()
    counted = [line for line in lines if any(word in line for word in (" passed", " failed", " skipped", " error"))]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = next((line for line in reversed(lines) if line.strip()), "said nothing")
    return {"result": (counted[-1] if counted else last).strip("= "), "failed": failed}
