"""The order of imports, as far as import-linter's contracts in pyproject.toml do not check it."""

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fp4dit_ao
from tests.conftest import ROOT

FOLDERS = {"fp4dit_ao": "fp4dit_ao", "fp4dit_ao.passes": "passes", "fp4dit_ao.observers": "observers"}
"""Folders by the package that setuptools installs them as."""

LATE = {
    "fp4dit_ao.benchmark.peers": "torchao's prototypes are loaded for the peers that need them alone",
    "fp4dit_ao.cli.app": "a command loads torch and diffusers when it runs; `--help` is there at once",
    "fp4dit_ao.cli.commands.benchmark": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.demo": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.evaluate": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.export": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.generate": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.inspect": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.list_methods": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.quantize": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.commands.serve": "as in fp4dit_ao.cli.app",
    "fp4dit_ao.cli.serve": "FastAPI and uvicorn are optional",
    "fp4dit_ao.deploy.exported_transformer": "an exported file is loaded without torchao",
    "fp4dit_ao.kernels.cuda.int8_linear": "Triton is optional",
    "fp4dit_ao.kernels.decoded_linear": "Triton is optional",
    "fp4dit_ao.kernels.fp8_attention": "Triton is optional",
    "fp4dit_ao.kernels.level_linear": "Triton is optional",
}
"""Modules that import another module of this package inside of a function, and what that saves."""

HEAVY_OR_OPTIONAL = {
    "PIL", "accelerate", "diffusers", "fastapi", "huggingface_hub", "matplotlib", "peft", "ray", "safetensors", "torch",
    "torchao", "torchmetrics", "transformers", "triton", "uvicorn",
    "resource",
}  # fmt: skip
"""Packages that may be imported inside of functions; Python's ``resource`` exists on Unix alone."""


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    late: bool
    """Whether it stands in a function."""


def modules() -> dict[str, Path]:
    """Files by the dotted name of their module."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(importer: str) -> Iterator[Import]:
    """Every import in a module but those for type checkers; of this package's modules, not of names in them."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(importer, alias.name, child.lineno, late)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{importer}, line {child.lineno}: a relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                for imported in dict.fromkeys(name if name in MODULES else child.module for name in names):
                    yield Import(importer, imported, child.lineno, late)
            yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(MODULES[importer].read_text(encoding="utf-8")), False)


IMPORTS = [found for module in MODULES for found in imports(module)]


def test_imports_inside_of_functions_are_few_and_each_saves_something() -> None:
    late = [found for found in IMPORTS if found.late and found.imported.split(".")[0] == "fp4dit_ao"]
    unexplained = [f"{found.importer}:{found.line} {found.imported}" for found in late if found.importer not in LATE]
    assert not unexplained, "import at the top of the module, or say in LATE what importing late saves"
    assert LATE.keys() == {found.importer for found in late}, "LATE names a module that imports nothing late"
    assert len({(found.importer, found.line) for found in late}) < 24


def test_other_packages_are_imported_late_only_if_heavy_or_optional() -> None:
    late = {
        f"{found.importer}:{found.line} {found.imported}"
        for found in IMPORTS
        if found.late and found.imported.split(".")[0] not in HEAVY_OR_OPTIONAL | {"fp4dit_ao"}
    }
    assert not late


def test_no_module_is_part_of_a_cycle_if_late_imports_are_counted() -> None:
    known: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if found.imported in MODULES and found.imported != found.importer:
            known[found.importer].add(found.imported)
    while free := {module for module, imported in known.items() if not imported & known.keys()}:
        known = {module: imported for module, imported in known.items() if module not in free}
    assert not known, "these import each other, or a module that is part of a cycle"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fp4dit_ao"])
def test_module_is_named_like_no_public_function(module: str) -> None:
    """``fp4dit_ao.capture`` would be the module once anything imported it, and the function before."""
    functions = {name for name in fp4dit_ao.__all__ if callable(getattr(fp4dit_ao, name))}
    assert module.split(".")[-1] not in functions


def test_every_module_has_a_place_in_the_order_of_imports() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    rooms = {room.strip() for layer in layers for room in layer.split(":")}
    packages = {"fp4dit_ao", "fp4dit_ao.passes"}  # their __init__ imports nothing of the rooms
    placed = {
        module
        for module in MODULES
        if module in packages or any(module == room or module.startswith(f"{room}.") for room in rooms)
    }
    assert placed == MODULES.keys(), (
        "add the new module to the layers in pyproject.toml, at the level that it belongs to"
    )
    assert rooms <= MODULES.keys(), "pyproject.toml names a module that does not exist"


MOST_ANY = {
    "fp4dit_ao": 1, "fp4dit_ao/_compat": 9, "fp4dit_ao/benchmark": 13, "fp4dit_ao/calibration": 1, "fp4dit_ao/checkpoint": 6,
    "fp4dit_ao/cli": 8, "fp4dit_ao/config": 2, "fp4dit_ao/deploy": 2, "fp4dit_ao/diffusers_integration": 14,
    "fp4dit_ao/evaluation": 3, "fp4dit_ao/graph_capture": 4, "fp4dit_ao/kernels": 6, "fp4dit_ao/reference": 1,
    "fp4dit_ao/schemes": 2, "fp4dit_ao/serving": 2, "fp4dit_ao/tensors": 6, "observers": 3, "passes/fine_tuning": 3,
    "passes/reconstruction": 14,
    "passes/transforms": 1, "fp4dit_ao/util": 2,
}  # fmt: skip
"""Most lines with ``Any``, by folder; other folders have none. What is left are contexts of autograd functions, arguments that
torch or diffusers hand over or take, and parsed JSON that is not checked yet."""


def test_any_stands_only_where_no_type_is_known() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for path in MODULES.values():
        place = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id == "Any":
                found["/".join(place.parent.parts[:2])].add(f"{place}:{node.lineno}")
    more = {folder: sorted(lines) for folder, lines in found.items() if len(lines) > MOST_ANY.get(folder, 0)}
    assert not more, (
        "name the type that is really there: `object` for what is only passed on or checked by isinstance, a Protocol for what "
        "has certain methods, a TypedDict for known keys, diffusers' classes under TYPE_CHECKING; where no type is known, "
        "raise the folder's number in MOST_ANY"
    )
