"""Private names of torch, torchao and diffusers stand in ``fp4dit_ao/_compat`` alone, a module's own in that module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fp4dit_ao", "passes", "observers", "benchmarks")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / "fp4dit_ao/_compat")
]
OWN_MODULES = {"_compat", "_registration"}
UNSTABLE = {"prototype", "_inductor"}
"""Public in spelling, but without a promise of stability: packages that may change with every release."""
OVERRIDES = {
    "_stable_hash_for_caching": "torch's compile caches ask tensor subclasses for it (torch._inductor.codecache says so)",
    "_apply": "what to(), half() and cuda() of a module call; swapping contents in place fails on weights of a compiled graph",
}
"""Methods that our classes define under private names of their bases, and why they may."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def names_of_instances(tree: ast.AST) -> set[str]:
    """Private attributes that a file's own classes define: methods, class variables, assignments to ``self`` or ``cls``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(member.name)
                targets = member.targets if isinstance(member, ast.Assign) else [getattr(member, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and is_self(inner.value):
                    found.add(inner.attr)
    return {name for name in found if is_private(name)}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def aliases_of_aten(tree: ast.Module) -> set[str]:
    """``torch.ops.aten`` and the names that a file gives to it; its operators may start with an underscore."""
    names = {"torch.ops.aten"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "torch.ops.aten":
            names |= {ast.unparse(target) for target in node.targets}
    return names


def uses(source: str, inherited: set[str] = frozenset()) -> Iterator[str]:
    """Every use in ``source`` of a private name that is not its own.

    Args:
        source: a file's text.
        inherited: private attributes of classes elsewhere in the package, which ``self`` may have.
    """
    tree = ast.parse(source)
    own, aten = names_of_instances(tree), aliases_of_aten(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            allowed = own | inherited if is_self(node.value) else own
            if node.attr not in allowed and ast.unparse(node.value) not in aten:
                yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            for alias in node.names:
                path = [part for part in (*module, *alias.name.split(".")) if part]
                private = {part for part in path if is_private(part) or part in UNSTABLE}
                if private - (OWN_MODULES if path[0] == "fp4dit_ao" else set()):
                    yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield ast.unparse(node)


@pytest.fixture(scope="module")
def inherited() -> set[str]:
    return set().union(*(names_of_instances(ast.parse(path.read_text())) for path in SOURCES))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_outside_of_compat(path: Path, inherited: set[str]) -> None:
    name = str(path.relative_to(ROOT))
    found = list(uses(path.read_text(), inherited))
    assert not found, (
        f"{name} uses {found}; put a thin function into fp4dit_ao/_compat and test it in tests/test_compat.py"
    )


def test_private_methods_of_bases_are_overridden_knowingly() -> None:
    from fp4dit_ao import MinifloatTensor, QuantizedTransformer
    from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight
    from fp4dit_ao.tensors.levels import LevelTensor

    ours = (MinifloatTensor, LevelTensor, MXWeight, NVFP4Weight, QuantizedTransformer)
    made_by_torchao = {"_ATEN_OP_TABLE", "_TORCH_FN_TABLE"}
    found = set()
    for cls in ours:
        foreign = {name for base in cls.__mro__ if not base.__module__.startswith("fp4dit_ao") for name in vars(base)}
        foreign |= {"_stable_hash_for_caching"}  # looked up by name, no base has it
        own = {
            n for base in cls.__mro__ if base.__module__.startswith("fp4dit_ao") for n in vars(base) if is_private(n)
        }
        found |= own & foreign - made_by_torchao
    assert found == set(OVERRIDES)


@pytest.mark.parametrize(
    "source",
    [
        "torch._int_mm(x, y)",
        "x = graph._codegen",
        "module._parameters['weight'] = y",
        "self._parameters",
        "from torch.utils import _pytree as pytree",
        "import torch._inductor",
        "from torch._inductor import config",
        "from torchao.prototype.mx_formats.mx_tensor import MXTensor",
        "getattr(pipe, '_progress_bar_config', {})",
        "from fp4dit_ao.kernels.attention import _levels",
        "def _apply(): pass\nmodel._apply = _apply",
        "aten = torch.ops.other\naten._to_copy",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert list(uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    _kind: int = 1\n    def __init__(self):\n        self._x = 1\n    def same(self, other):\n"
        "        return self._x == other._x and self._kind == other._kind",
        "torch.ops.aten._to_copy.default",
        "_ATEN = torch.ops.aten\n_ATEN._pin_memory.default",
        "hasattr(x, '__tensor_flatten__')",
        "from fp4dit_ao import _compat\n_compat.parts(cls)",
        "_private()",
    ],
)
def test_own_names_and_operators_are_allowed(source: str) -> None:
    assert not list(uses(source))
