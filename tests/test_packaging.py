"""What is installed: packages, sources of the C library, and what other packages they need."""

import ast
import importlib.machinery
import importlib.util
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from setuptools import Distribution, Extension

from tests.conftest import ROOT
from tests.test_architecture import MODULES
from tests.test_docs import links

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]

NOT_IMPORTED = {
    "openai": "a client in tests/serving, imported by name if it is there",
    "python-multipart": "starlette reads forms with it",
    "sentencepiece": "transformers reads T5's tokenizers with it",
    "pytest-timeout": "pytest's option timeout",
    "pytest-xdist": "pytest's option -n",
    "pytest-cov": "pytest's option --cov",
    "pytest-instafail": "pytest's option --instafail",
    "ruff": "a command",
    "mypy": "a command",
    "build": "a command",
    "pre-commit": "a command",
    "import-linter": "a command",
    "mkdocs-material": "the theme in mkdocs.yml",
    "mkdocstrings": "a plug-in in mkdocs.yml",
    "ipykernel": "nbclient starts it",
    "torch-fidelity": "torchmetrics computes Inception's features with it",
    "optimum-quanto": "a peer in the benchmark, imported by name if it is there",
    "sdnq": "likewise",
    "bitsandbytes": "likewise",
}
"""Requirements that no file imports, and what they are for."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*extras: str) -> set[str]:
    """Distributions that pyproject.toml names: the package's own, and those of ``extras``."""
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    names = (re.match(r"[\w.-]+", line) for line in listed)
    return {canonical(name[0]) for name in names if name} - {"fp4dit-ao"}


def imported(*folders: str) -> set[str]:
    """Distributions that the files of these folders import, for type checkers included."""
    distributions = metadata.packages_distributions()
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                if not (ROOT / top).is_dir():
                    assert top in distributions, f"{path.relative_to(ROOT)} imports {top}, which is not installed"
                    found.add(canonical(distributions[top][0]))
    return found


EXTRAS = tuple(PROJECT["optional-dependencies"])


def test_what_the_package_imports_is_declared() -> None:
    users = [extra for extra in EXTRAS if extra not in {"dev", "docs", "peers"}]
    optional_compiler = {"triton"}  # comes with CUDA builds of torch; the tests install it everywhere
    assert imported("fp4dit_ao", "passes", "observers") <= required(*users) | optional_compiler


def test_what_tests_and_tools_import_is_declared() -> None:
    assert imported("tests", "benchmarks", "tutorials", "docs", ".ci") <= required(*EXTRAS)


def test_what_is_declared_is_used() -> None:
    everywhere = imported("fp4dit_ao", "passes", "observers", "tests", "benchmarks", "tutorials", "docs", ".ci")
    assert required(*EXTRAS) == everywhere | set(NOT_IMPORTED)
    assert not everywhere & set(NOT_IMPORTED)


def test_every_requirement_is_pinned_for_ci() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in pins)
    names = [canonical(line.split("==")[0]) for line in pins]
    assert len(set(names)) == len(names)
    assert required(*EXTRAS) <= set(names)


def test_pinned_packages_run_on_the_oldest_python() -> None:
    """With a pin that wants a later patch release, pip searches for minutes and then finds nothing: Debian 12 has 3.11.2."""
    oldest = f"{PROJECT['requires-python'].removeprefix('>=')}.0"
    wanted = {each.metadata["Name"]: each.metadata["Requires-Python"] for each in metadata.distributions()}
    assert {name for name, versions in wanted.items() if oldest not in SpecifierSet(versions or "")} == set()


@pytest.fixture(scope="module")
def build() -> Any:
    """The module ``setup.py``."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_wheel_serves_every_python(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [library] = SETUPTOOLS["ext-modules"]
    made = Distribution({"cmdclass": {"bdist_wheel": build.AnyPython, "build_ext": build.PlainLibrary}, "name": "x"})
    made.ext_modules = [Extension(library["name"], library["sources"])]
    made.packages = []
    wheel, extension = made.get_command_obj("bdist_wheel"), made.get_command_obj("build_ext")
    wheel.ensure_finalized()
    extension.ensure_finalized()
    interpreter, abi, platform = wheel.get_tag()
    assert (interpreter, abi) == ("py3", "none") and platform != "any"
    assert extension.get_ext_filename(library["name"]) in {
        str(Path(*library["name"].split(".")).with_suffix(suffix))
        for suffix in importlib.machinery.EXTENSION_SUFFIXES[-1:]
    }


def test_the_library_includes_no_header_of_python() -> None:
    sources = (ROOT / "fp4dit_ao" / "kernels" / "cpu" / "csrc").glob("*.[ch]")
    assert not [path.name for path in sources if "Python.h" in path.read_text(encoding="utf-8")]


def test_the_readme_of_an_index_links_to_no_file(build: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert links(readme)
    shown = build.described(readme, None)
    assert not links(shown)
    assert "![" not in shown and "[FP4DiT](https://arxiv.org/abs/2503.15465)" in shown
    assert re.findall("^```(?s:.*?)^```", shown, re.MULTILINE) == re.findall("^```(?s:.*?)^```", readme, re.MULTILINE)
    text = "![a](b/c.png) [`d`](e.md#f) [g](https://h.org) `[i](j)`\n"
    there = "![a](https://x.org/r/raw/main/b/c.png) [`d`](https://x.org/r/blob/main/e.md#f) [g](https://h.org)"
    assert build.described(text, "https://x.org/r").startswith(there)
    assert build.described(text, None).startswith(" `d` [g](https://h.org)")


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml's list of packages forgets would be missing from the wheel."""
    assert set(SETUPTOOLS["packages"]) == {name for name, path in MODULES.items() if path.name == "__init__.py"}


@pytest.mark.parametrize("suffix", ["c", "h"])
def test_every_source_of_the_library_is_built_and_shipped(suffix: str) -> None:
    """Headers are in ``depends``, for rebuilding; MANIFEST.in puts them into the sdist by a pattern."""
    [library] = SETUPTOOLS["ext-modules"]
    listed = library["sources"] if suffix == "c" else library["depends"]
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "fp4dit_ao" / "kernels" / "cpu" / "csrc").glob(f"*.{suffix}")
    }
    assert set(listed) == found
    assert "include fp4dit_ao/kernels/cpu/csrc/*.h" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()


def test_files_beside_the_code_are_matched_by_package_data() -> None:
    folder = ROOT / "fp4dit_ao" / "reference"
    patterns = SETUPTOOLS["package-data"]["fp4dit_ao.reference"]
    data = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert data == {path for pattern in patterns for path in folder.glob(pattern)}
    assert Path(ROOT / "fp4dit_ao" / "py.typed").is_file()
