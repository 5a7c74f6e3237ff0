"""``import fp4dit_ao`` loads nothing heavy, and adds to torch and diffusers as soon as they are there."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["fp4dit_ao, torch", "torch, fp4dit_ao"])
def test_operators_exist_once_torch_and_the_package_are_imported(first: str) -> None:
    script = (
        f"import sys, {first}\n"
        "print(torch.ops.fp4dit_ao.choose_scale, torch.ops.fp4dit_ao.quantize, torch.ops.fp4dit_ao.dequantize)\n"
        "print('torchao' in sys.modules, type(torch.__spec__.loader).__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == ["fp4dit_ao.choose_scale fp4dit_ao.quantize fp4dit_ao.dequantize", "False SourceFileLoader"]


@pytest.mark.parametrize(
    "line",
    [
        "from fp4dit_ao import FloatFormat",
        "import fp4dit_ao.config, fp4dit_ao.ops",
        "import fp4dit_ao.kernels, fp4dit_ao.ops",
        "import fp4dit_ao.observers",
        "import fp4dit_ao.cli.demo",
        "from fp4dit_ao.families import table; from fp4dit_ao import QuantConfig",
    ],
)
def test_any_module_may_be_the_first_to_import_torch(line: str) -> None:
    script = f"{line}\nimport torch\nprint(torch.ops.fp4dit_ao.choose_scale)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "fp4dit_ao.choose_scale\n"


def test_what_torchao_registers_is_no_warning_of_ours() -> None:
    """torch writes of each enumeration on its log, torchao's own first, which whoever imports torchao sees."""
    script = "import torchao, sys; print('--', file=sys.stderr, flush=True); import fp4dit_ao.tensors.block_scaled"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stderr.partition("--\n")[2] == ""


def test_the_package_takes_less_than_a_second_beyond_torch() -> None:
    script = (
        "import sys, time, fp4dit_ao\n"
        "assert 'torch' not in sys.modules\n"
        "del sys.modules['fp4dit_ao'], sys.modules['fp4dit_ao._registration']\n"
        "sys.meta_path.pop(0)\n"
        "import torch\n"
        "began = time.process_time()\n"
        "import fp4dit_ao\n"
        "torch.ops.fp4dit_ao.choose_scale\n"
        "print(time.process_time() - began)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 1
