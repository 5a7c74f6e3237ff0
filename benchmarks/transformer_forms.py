"""Every transformer of diffusers as modules and as a graph: what of each is quantized, how far it is from float, what fails."""

import copy
import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.small_transformers import small_inputs, small_transformer
from fp4dit_ao import capture, lower, quantize_modules, quantizer_for
from fp4dit_ao._compat import pytree
from fp4dit_ao.diffusers_integration.module_form import record_of
from fp4dit_ao.families.patterns import KEPT
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.util.markdown import markdown_table


@dataclass
class Outcome:
    """How one class fares in one form."""

    error: float | None = None
    """L2 norm of the difference from float, relative to float's; None if it did not run."""
    quantized: int = 0
    """Linears with low-bit weights."""
    linears: int = 0
    """Linears in all; in a graph, those that this call reaches."""
    left: tuple[str, ...] = ()
    """Why the others were left, most frequent first."""
    failed: str | None = None
    """Why it does not run; None if it does."""
    seconds: float = 0.0


FORMS = {"modules": "Module form", "graph": "Graph"}
"""Titles of the forms, in the order of the table's columns."""


def results(output: object) -> Tensor:
    """All floating-point numbers that a ``forward`` returned, as one vector."""
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.cat([x.float().flatten() for x in tensors])


def run(form: Any, kind: str, model: nn.Module) -> Tensor:
    """Results of ``model``, or of another form of it, on inputs that are made anew: a call may change a cache among them."""
    with torch.no_grad():
        return results(form(**small_inputs(kind, model), return_dict=False))


def outcome(decisions: Iterable[Decision], found: Tensor, expected: Tensor) -> Outcome:
    """Outcome of a form that ran."""
    rows = [decision for decision in decisions if decision.kind == "linear"]
    left = Counter(_short(row.reason) for row in rows if row.config is None)
    error = float((found - expected).norm() / expected.norm())
    done = sum(row.config is not None for row in rows)
    return Outcome(error, done, len(rows), tuple(f"{number} {why}" for why, number in left.most_common()))


def as_modules(kind: str, recipe: str) -> Outcome:
    """Outcome of the module form."""
    model = small_transformer(kind)
    expected = run(model, kind, model)
    quantized = quantize_modules(copy.deepcopy(model), recipe)  # type: ignore[arg-type]
    return outcome(record_of(quantized).decisions, run(quantized, kind, model), expected)


def as_graph(kind: str, recipe: str) -> Outcome:
    """Outcome of the graph form."""
    model = small_transformer(kind)
    expected = run(model, kind, model)
    quantizer = quantizer_for(model, recipe)
    with torch.no_grad():
        prepared = prepare_pt2e(capture(model, small_inputs(kind, model)), quantizer)
        graph = lower(convert_pt2e(prepared, fold_quantize=False))
    return outcome(quantizer.decisions.values(), run(graph, kind, model), expected)


_MEASURES: dict[str, Callable[[str, str], Outcome]] = {"modules": as_modules, "graph": as_graph}


def measure(kind: str, form: str, recipe: str) -> Outcome:
    """Outcome of one class in one form; an error becomes a reason."""
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning for each class that the table of families lacks
            found = _MEASURES[form](kind, recipe)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        found = Outcome(failed=f"{type(error).__name__}: {reason}")
    return dataclasses.replace(found, seconds=time.perf_counter() - began)


def _short(reason: str) -> str:
    kept = reason.removeprefix("recipe keeps ").strip("'")
    if kept == reason:
        return reason
    return f"`{kept}`" if kept in KEPT else "outside of the blocks"


def forms_table(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Markdown table of the classes, one row each."""
    head = ["class", "modules", "error", "graph", "error", "left in the module form"]
    return markdown_table(head, [_cells(kind, forms) for kind, forms in rows.items()])


def _cells(kind: str, forms: Mapping[str, Outcome]) -> list[str]:
    results = [cell for form in FORMS for cell in _result(forms.get(form))]
    return [kind, *results, "; ".join(forms["modules"].left) if "modules" in forms else ""]


def _result(found: Outcome | None) -> list[str]:
    if found is None:
        return ["untried", ""]
    return ["no", ""] if found.error is None else [f"{found.quantized} of {found.linears}", f"{found.error:.2f}"]


def summary(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """How many classes run in each form, and why others do not."""
    lines = []
    for form, title in FORMS.items():
        tried = {kind: forms[form] for kind, forms in rows.items() if form in forms}
        failed = {kind: found.failed for kind, found in tried.items() if found.failed is not None}
        untried = f", {len(rows) - len(tried)} untried" if len(tried) < len(rows) else ""
        lines.append(f"{title}: {len(tried) - len(failed)} of {len(rows)} classes{untried}.")
        lines += [f"- {kind}: {why}" for kind, why in failed.items()]
    return "\n".join(lines)
