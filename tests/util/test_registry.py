"""Registries of plug-in points."""

import pytest

from fp4dit_ao.util.registry import MethodInfo, Registry


def test_methods_are_found_by_name_and_listed_in_order() -> None:
    registry: Registry[int] = Registry("rounding")
    assert registry.register("b", 1, summary="One.", source="A paper, eq. 1", cost="seconds") == 1
    registry.register("a", 2, summary="Two.")
    assert (registry.find("b"), registry["a"], list(registry), len(registry)) == (1, 2, ["b", "a"], 2)
    assert registry.infos()[0] == MethodInfo("rounding", "b", "One.", "A paper, eq. 1", "seconds")


def test_unknown_and_taken_names_are_refused() -> None:
    registry: Registry[object] = Registry("scope")
    method = object()
    registry.register("block", method, summary="Blocks.")
    registry.register("block", method, summary="Blocks, registered once more.")
    with pytest.raises(ValueError, match="there is another scope named 'block'"):
        registry.register("block", object(), summary="Others.")
    with pytest.raises(ValueError, match="unknown scope 'layer'; choose one of block"):
        registry.find("layer")
    with pytest.raises(ValueError, match="unknown scope"):
        registry.find(None)  # type: ignore[arg-type]
