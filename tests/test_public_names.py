"""The names that users' code relies on: one that vanishes breaks somebody's script. Names are added here, never taken away."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import fp4dit_ao
import fp4dit_ao.kernels  # registers the operators that compute
from fp4dit_ao.cli.app import app
from fp4dit_ao.config import RECIPES, QuantConfig
from fp4dit_ao.formats import parse
from tests.conftest import ROOT

PACKAGE = {
    "AdaRoundConfig", "CodebookTensor", "FP4DiTConfig", "FP4DiTQuantizer", "FloatFormat", "MinifloatTensor",
    "QuantConfig", "QuantizedTransformer", "ReconstructionConfig", "calibrate", "capture", "collect_samples",
    "compile_blocks", "example_inputs", "export", "export_single_file", "load_pipeline", "lower", "methods",
    "quantize_modules", "quantize_pipeline", "quantizer_for", "read_single_file", "reconstruct", "transform",
    "unpack_weights", "w4a6", "w4a6_auto", "w4a6_codebook", "w4a8", "w4a8_codebook",
}  # fmt: skip
"""``from fp4dit_ao import …``."""

MODULES = {
    "fp4dit_ao.export": {"load", "save_package", "save_program"},
    "fp4dit_ao.families": {"FAMILIES", "Family", "family_of", "recipe_for"},
    "fp4dit_ao.formats": {"CodebookFormat", "FloatFormat", "NumberFormat", "pack", "parse", "register_codebook", "unpack"},
    "fp4dit_ao.observers": {
        "FloatObserver", "StaticActivationObserver", "TokenActivationObserver", "WeightObserver", "set_fake_quantize",
    },
    "fp4dit_ao.ops": {"choose_scale", "dequantize", "fake_quantize", "quantize"},
    "fp4dit_ao.reference": {"path", "prompts"},
    "fp4dit_ao.serving.ray": {"build"},
}  # fmt: skip
"""Names of modules that the documentation and the design name."""

OPERATORS = {
    "attention": "Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str fmt",
    "choose_block_scale": "Tensor x, SymInt[] block_size, str fmt, str kind",
    "choose_scale": "Tensor x, SymInt[] block_size, str fmt, ScalarType scale_dtype",
    "dequantize": "Tensor codes, SymInt[] block_size, Tensor scale, str fmt, ScalarType output_dtype",
    "fake_quantize": "Tensor x, SymInt[] block_size, Tensor scale, str fmt, ScalarType output_dtype",
    "int8_linear": (
        "Tensor tokens, Tensor token_scale, Tensor qdata, Tensor scale, int[] table, Tensor? bias, ScalarType output_dtype"
    ),
    "mx_dequantize": "Tensor qdata, Tensor scale, str fmt, ScalarType dtype",
    "quantize": "Tensor x, SymInt[] block_size, Tensor scale, str fmt",
    "quantize_tokens": "Tensor x, str fmt",
    "tanh_gelu": "Tensor x",
}
"""``torch.ops.fp4dit_ao``: with the leading arguments, which exported files call by position."""

RECIPE_NAMES = {
    "int_w4a4", "int_w4a6", "int_w4a8", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "nvfp4", "nvfp4_four_over_six",
    "nvfp4_four_over_six_both", "w4a4",
    "w4a4_codebook", "w4a4_twin_log", "w4a6", "w4a6_lowbit_fp", "w4a8_lowbit_fp", "w4a6_auto", "w4a6_e1m2", "w4a6_e2m1",
    "w4a6_mse", "w4a6_nf4", "w4a6_static", "w4a8", "w4a8_e4m3", "w4a8_int8",
    "w8a8",
}  # fmt: skip

COMMANDS = {"benchmark", "demo", "evaluate", "export", "generate", "inspect", "quantize", "serve"}


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_package(name: str) -> None:
    assert name in fp4dit_ao.__all__
    assert name in dir(fp4dit_ao)
    assert getattr(fp4dit_ao, name) is not None


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MODULES.items() for name in sorted(names)]
)
def test_module(module: str, name: str) -> None:
    owner = fp4dit_ao.export if module == "fp4dit_ao.export" else importlib.import_module(module)
    assert getattr(owner, name) is not None


def test_type_checkers_know_what_is_imported_on_first_use() -> None:
    """``__init__`` says each name twice: for Python, and under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "fp4dit_ao" / "__init__.py").read_text(encoding="utf-8"))
    checked = [
        alias.asname or alias.name
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in ast.walk(block)
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    assert sorted(checked) == sorted(fp4dit_ao.__all__)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator(operator: str) -> None:
    schema = str(getattr(torch.ops.fp4dit_ao, operator).default._schema)
    assert schema.startswith(f"fp4dit_ao::{operator}({OPERATORS[operator]}")


def test_recipes() -> None:
    assert set(RECIPES) >= RECIPE_NAMES
    for name in RECIPE_NAMES:
        assert isinstance(QuantConfig.from_name(name), QuantConfig)


@pytest.mark.parametrize(
    "name", ["e2m1", "e3m0", "e1m2", "e2m3", "e3m2", "e3m4", "e4m3fn", "int4", "int6", "int8", "nf4"]
)
def test_formats(name: str) -> None:
    assert str(parse(str(parse(name)))) == str(parse(name))


def test_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"fp4dit-ao": "fp4dit_ao.cli.app:main"}
    shown = CliRunner().invoke(app, ["--help"]).output
    assert set(re.findall(r"^\W*([a-z]+)  ", shown, re.MULTILINE)) >= COMMANDS


def test_diffusers_finds_the_quantizer() -> None:
    """In a process of its own: ``import fp4dit_ao`` alone must be enough, and before diffusers as after it."""
    code = (
        "import fp4dit_ao, diffusers.quantizers.auto as auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['fp4dit_ao'] and auto.AUTO_QUANTIZATION_CONFIG_MAPPING['fp4dit_ao']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fp4dit_ao.__version__"}
    assert metadata.version("fp4dit-ao") == fp4dit_ao.__version__, "another version is installed: pip install -e ."
