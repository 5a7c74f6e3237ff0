"""``torch.compile`` of a module that was never called: one graph, nothing set up inside of the call, once for equal shapes."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def check_first_call(model: nn.Module, *args: object, backend: str = "eager", **kwargs: object) -> Tensor:
    """Asserts that the first call of ``model`` is traced as one graph, sets nothing up, and suffices for later ones.

    The result is that of the uncompiled module, bit for bit. Later calls with the same shapes compile nothing, not even after
    one of the uncompiled module.

    Returns:
        the result.
    """
    forget_what_was_looked_up()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    before = attributes(model)
    found = first_tensor(compiled(*args, **kwargs))
    assert not (names := changes(before, attributes(model))), names
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(first_tensor(compiled(*args, **kwargs)), found)
    assert torch.equal(first_tensor(model(*args, **kwargs)), found)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(first_tensor(compiled(*args, **kwargs)), found)
    return found


def first_tensor(result: Any) -> Tensor:
    """The tensor in what a model returns: itself, or the first item of an output class or a tuple."""
    return result if isinstance(result, Tensor) else first_tensor(result[0])


def forget_what_was_looked_up() -> None:
    """Clears what was compiled, and the cache of every function of the package, as in a new process."""
    torch.compiler.reset()
    for name, module in list(sys.modules.items()):
        if name.startswith("fp4dit_ao"):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def attributes(model: nn.Module) -> dict[str, object]:
    """All that a call could set up: attributes of the modules of ``model``, of their processors, and of their weights."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        holders: dict[str, object] = {path: module, f"{path}.processor": getattr(module, "processor", None)}
        holders |= {f"{path}.{name}": x for name, x in module.named_parameters(recurse=False)}
        for place, holder in holders.items():
            for name, value in getattr(holder, "__dict__", {}).items():
                if not name.startswith("_dynamo_"):  # torch's marks on every tensor that it traced
                    found[f"{place}.{name}"] = _content(value)
    return found


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Names of the attributes that were added, removed or set."""
    return sorted({name for name, _ in before.items() ^ after.items()})


def _content(value: object) -> object:
    """Stand-in for ``value``, equal while nothing is set in it: an object's identity, and that of a collection's items, but for
    texts, which may be made anew."""
    if isinstance(value, Mapping):
        return tuple((key, id(item)) for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, Tensor | str):
        return tuple(sorted(map(repr, value))) if isinstance(value, set) else tuple(map(_identity, value))
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def _identity(item: object) -> object:
    return item if isinstance(item, str) else id(item)
