"""All families at small width, through the whole flow: ``python -m benchmarks.families``.

Prints two Markdown tables, of the families that the package knows and of all transformers of diffusers, and writes
``families.json``. Weights are random: errors show that a graph is quantized correctly, and how families compare at equal
width, but nothing about images. ``--compile`` adds ``torch.compile``; ``--all`` captures all transformers as graphs. What
fails is listed as such; the exit status is 1 if it is a family, or the module form of any transformer.
"""

import copy
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from tqdm import tqdm

from benchmarks import transformer_forms
from benchmarks.small_transformers import SMALL_TRANSFORMERS, randomize, transformer_classes
from benchmarks.small_transformers.known import KNOWN as SMALL
from benchmarks.transformer_forms import Outcome
from fp4dit_ao import QuantConfig, QuantizedTransformer, capture, lower, quantizer_for
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.families import example_inputs
from fp4dit_ao.families.sample_inputs import Size
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

OTHER = Size(batch=3, height=12, width=20, frames=5, text=7)
"""Sizes that differ from the captured ones: even, for patches, and not square."""


def small_model(name: str, seed: int = 0) -> nn.Module:
    """Model of :data:`SMALL`; its linears are scaled so that outputs of layers have the magnitude of their inputs."""
    import diffusers

    kind, config = SMALL[name]
    torch.manual_seed(seed)
    return randomize(getattr(diffusers, kind)(**config))


def other_size(name: str) -> Size:
    """:data:`OTHER`, made square for models that draw only squares."""
    square = SMALL[name][0] == "DiTTransformer2DModel"
    return Size(OTHER.batch, OTHER.height, OTHER.height) if square else OTHER


def relative(x: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference, relative to that of ``reference``."""
    return float((x - reference).norm() / reference.norm())


@torch.no_grad()
def quantize(model: nn.Module, graph: GraphModule, recipe: str = "w4a6") -> QuantizedTransformer:
    """Quantizes a captured graph with nearest rounding."""
    quantizer = quantizer_for(model, recipe)
    prepared = prepare_pt2e(copy.deepcopy(graph), quantizer)
    lowered = lower(convert_pt2e(prepared, fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    return QuantizedTransformer(
        lowered, model, sample_description.describe(bind(model, example_inputs(model))), decisions
    )


@torch.no_grad()
def row_of(name: str, model: nn.Module, graph: GraphModule, quantized: QuantizedTransformer) -> dict[str, Any]:
    """Row of the table, without times and compilation."""
    sample = example_inputs(model, other_size(name), seed=1)
    expected = model(**sample, return_dict=False)[0]
    return {
        "layers": [vars(layer) for layer in quantized.summary()],
        "share of weights": share_quantized(quantized, model),
        "captured": float((graph(**sample)[0] - expected).abs().max()),
        "error": relative(quantized(**sample).sample, expected),
        "seconds": {},
    }


def measure(name: str, recipe: str, compile: bool, say: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """Row of the table. If a stage fails, the row holds the results so far, and the stage and its error as
    ``"failed"``.

    Args:
        name: name of a model in :data:`SMALL`.
        recipe: name of a recipe.
        compile: also run the model under ``torch.compile``.
        say: called with a description of the current work.
    """
    row: dict[str, Any] = {"seconds": {}}
    stage = ""
    try:
        for stage in _stages(name, recipe, compile, row):
            say(f"{name}: {stage}")
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        row["failed"] = f"{stage}: {type(error).__name__}: {reason}"
    return row


@torch.no_grad()
def _stages(name: str, recipe: str, compile: bool, row: dict[str, Any]) -> Iterator[str]:
    """Fills ``row``; yields the name of each stage before it starts."""
    seconds: dict[str, float] = row["seconds"]
    yield "capture"
    model = small_model(name)
    began = time.perf_counter()
    graph = capture(model, example_inputs(model))
    seconds["capture"] = time.perf_counter() - began
    yield "quantize"
    began = time.perf_counter()
    quantized = quantize(model, graph, recipe)
    seconds["quantize"] = time.perf_counter() - began
    yield "compare"
    row |= row_of(name, model, graph, quantized) | {"seconds": seconds}
    if not compile:
        return
    yield "compile"
    sample = example_inputs(model, other_size(name), seed=1)
    expected, uncompiled = model(**sample, return_dict=False)[0], quantized(**sample).sample
    torch.compiler.reset()
    quantized.compile_graph()
    began = time.perf_counter()
    compiled = quantized(**sample).sample
    seconds["compile"] = time.perf_counter() - began
    row["compiled"] = {"error": relative(compiled, expected), "difference": relative(compiled, uncompiled)}


def share_quantized(quantized: QuantizedTransformer, model: nn.Module) -> float:
    """Fraction of the float model's parameters that became low-bit codes."""
    codes = sum(
        math.prod(row.shape) for row in quantized.summary() if row.kind == "linear" and row.quantized and row.shape
    )
    return codes / sum(p.numel() for p in model.parameters())


def cells(name: str, row: dict[str, Any], compile: bool) -> list[str]:
    """Cells of one row."""
    seconds = [_number(row["seconds"].get(stage), ".1f") for stage in stages(compile)]
    if "layers" not in row:
        return [name, "failed", *[""] * 6, *[""] * 2 * compile, *seconds]
    compiled = row.get("compiled", {})
    layers = row["layers"]
    kinds = {
        kind: [layer for layer in layers if layer["kind"] == kind] for kind in ("linear", "attention", "convolution")
    }
    count = {kind: f"{sum(layer['quantized'] for layer in found)} of {len(found)}" for kind, found in kinds.items()}
    formats = Counter(layer["weight"] for layer in kinds["linear"] if layer["quantized"])
    left = Counter(layer["reason"] for layer in layers if not layer["quantized"])
    return [
        name,
        count["linear"],
        ", ".join(f"{fmt} {number}" for fmt, number in formats.most_common()),
        count["attention"],
        f"{row['share of weights']:.0%}",
        "; ".join(f"{number} {_why(reason)}" for reason, number in left.most_common()),
        f"{row['captured']:.0e}" if row["captured"] else "0",
        f"{row['error']:.2f}",
        *([_number(compiled.get(of), fmt) for of, fmt in (("difference", ".0e"), ("error", ".2f"))] if compile else []),
        *seconds,
    ]


def _number(x: float | None, fmt: str) -> str:
    return "failed" if x is None else format(x, fmt)


def stages(compile: bool) -> list[str]:
    """Names of the timed stages."""
    return ["capture", "quantize", *["compile"] * compile]


_SHORT = {"convolutions are not quantized": "convolutions", "its products are no softmax attention": "linear attention"}


def _why(reason: str) -> str:
    return _SHORT.get(reason) or reason.replace("recipe keeps ", "").replace("'", "`")


def table(rows: dict[str, dict[str, Any]], compile: bool = False) -> str:
    """Markdown table of the rows."""
    head = [
        "family",
        "linears",
        "weights",
        "attentions",
        "of all parameters",
        "left as they are",
        "captured vs eager",
        "error",
        *["compiled vs not", "error, compiled"] * compile,
        *(f"{stage}, s" for stage in stages(compile)),
    ]
    return markdown_table(head, [cells(name, row, compile) for name, row in rows.items()])


def forms_of(
    kinds: Iterable[str], rows: dict[str, dict[str, Any]], recipe: str, every: bool
) -> dict[str, dict[str, Outcome]]:
    """Outcomes of classes by form; of graphs, those of families that were measured, unless ``every`` one is to be.

    Args:
        kinds: names of classes; one without a small model stays untried.
        rows: measured rows of :data:`SMALL`.
        recipe: name of a recipe.
        every: also capture classes that are no family of the table.
    """
    known = {kind: rows[name] for name, (kind, _) in reversed(SMALL.items()) if name in rows}
    found: dict[str, dict[str, Outcome]] = {}
    for kind in tqdm(kinds, desc="transformers"):
        found[kind] = {}
        if kind not in SMALL_TRANSFORMERS:
            continue
        found[kind]["modules"] = transformer_forms.measure(kind, "modules", recipe)
        if kind in known:
            found[kind]["graph"] = _measured(known[kind])
        elif every:
            found[kind]["graph"] = transformer_forms.measure(kind, "graph", recipe)
    return found


def _measured(row: dict[str, Any]) -> Outcome:
    linears = [layer for layer in row.get("layers", ()) if layer["kind"] == "linear"]
    return Outcome(
        row.get("error"), sum(layer["quantized"] for layer in linears), len(linears), failed=row.get("failed")
    )


def main(
    recipe: str = "w4a6",
    compile: Annotated[bool, typer.Option(help="Also run each under torch.compile: a minute or two a family.")] = False,
    names: Annotated[
        str, typer.Option(help="Families, separated by semicolons; all, and all transformers, if empty.")
    ] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Capture every transformer as a graph, too: many minutes.")
    ] = False,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measures and prints."""
    chosen = [name.strip() for name in names.split(";")] if names else list(SMALL)
    unknown = [name for name in chosen if name not in SMALL]
    if unknown:
        raise typer.BadParameter(f"no family {'; '.join(unknown)}; choose from {'; '.join(SMALL)}")
    QuantConfig.from_name(recipe)  # refuses an unknown name before any work
    rows: dict[str, dict[str, Any]] = {}
    with tqdm(chosen, desc="families") as bar:
        for name in bar:
            rows[name] = measure(name, recipe, compile, bar.set_postfix_str)
            result = {"recipe": recipe, "environment": environment(), "families": rows}
            write_text(out / "families.json", json.dumps(result, indent=1) + "\n")
    print(table(rows, compile))
    print(f"\nRecipe {recipe}, nearest rounding, random weights, another size than captured. {one_line()}")
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    for name, reason in failed.items():
        print(f"\n{name} failed: {reason}")
    if not names:
        forms = forms_of(transformer_classes(), rows, recipe, every)
        result["transformers"] = {
            kind: {form: dataclasses.asdict(found) for form, found in outcomes.items()}
            for kind, outcomes in forms.items()
        }
        write_text(out / "families.json", json.dumps(result, indent=1) + "\n")
        print(f"\n{transformer_forms.forms_table(forms)}\n\n{transformer_forms.summary(forms)}")
        failed |= {
            kind: found["modules"].failed for kind, found in forms.items() if found.get("modules", Outcome()).failed
        }
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
