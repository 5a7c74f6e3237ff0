"""The library on Arm, in an emulator: every kernel agrees with the portable one, and is left where a processor lacks it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
SOURCES = ROOT / "fp4dit_ao" / "kernels" / "cpu" / "csrc"

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {COMPILER} or no {EMULATOR}: apt-get install {PACKAGES}",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm") / "kernels_agree"
    sources = [*SOURCES.glob("*.c"), Path(__file__).with_name("kernels_agree.c")]
    command = [COMPILER, "-std=gnu11", "-O2", "-Wall", "-Werror", "-static", *sources, "-lm", "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def run(program: Path, processor: str, problems: int) -> str:
    command = [EMULATOR, "-cpu", processor, program, str(problems)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dot_products_are_those_of_plain_c(program: Path) -> None:
    said = run(program, "max", 300)
    assert said.splitlines() == ["linear: dotprod", "linear: portable", "codebook: dotprod", "codebook: portable"]


def test_a_processor_without_dot_products_runs_plain_c(program: Path) -> None:
    said = run(program, "cortex-a53", 2)
    assert said.splitlines() == ["linear: ", "linear: portable", "codebook: ", "codebook: portable"]
