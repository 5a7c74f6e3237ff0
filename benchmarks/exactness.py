"""Difference between the lowered model and the converted graph: ``python -m benchmarks.exactness``.

Prints, for each recipe on the reference transformer: the largest error of any lowered linear against float64 on the
same quantized operands (relative to the sum of magnitudes, the natural unit of float32 rounding); the same for the
converted graph's own linears; the largest difference of any step of the lowered graph that is given the converted
graph's inputs; the whole model's difference between the two in one call; that of the converted graph to itself, if its
latents change in their last bit; and how many of the activation codes differ, because a last-bit difference moved a
value across a rounding boundary. Writes ``exactness.json`` beside the table.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import MinifloatTensor, _compat, capture, collect_samples, lower, quantizer_for, reference
from fp4dit_ao.benchmark.exact import error, relative_error, token_wise
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.util.atomic_files import write_text

_LINEAR = torch.ops.aten.linear.default


class Linears(Interpreter):
    """Interpreter that keeps the input, weight, bias and output of every linear."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.seen: list[tuple[Tensor, Any, Tensor | None, Tensor]] = []

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.target is _LINEAR:
            x, weight, *rest = self.fetch_args_kwargs_from_env(node)[0]
            self.seen.append((x, weight, rest[0] if rest else None, result))
        return result


class Values(Interpreter):
    """Interpreter that keeps the value of every node, by the node's name, before any operator in place changes it."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.values: dict[str, Any] = {}

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        self.values[node.name] = value.clone() if type(value) is Tensor else value
        return value


class SameInputs(Interpreter):
    """Interpreter of a lowered graph that goes on with the converted graph's value after every node that both have.

    So every step has the converted graph's inputs, and differences do not add up. Nodes that lowering replaced have other
    names; what they compute is compared at the next node that both have.

    Args:
        graph: the lowered graph.
        values: values of the converted graph's nodes, by name.

    Attributes:
        worst: largest difference of a node's value, as a norm relative to that of the converted graph's value.
    """

    def __init__(self, graph: GraphModule, values: Mapping[str, Any]):
        super().__init__(graph)
        self.expected, self.worst = values, 0.0

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        expected = self.expected.get(node.name)
        both = node.op == "call_function" and isinstance(value, Tensor) and isinstance(expected, Tensor)
        if not both or torch.equal(value, expected):  # the same object, which an operator in place may change
            return value
        self.worst = max(self.worst, relative_error(value, expected))
        return expected


def lowered_errors(seen: list[tuple[Tensor, Any, Tensor | None, Tensor]]) -> Iterator[tuple[float, Tensor]]:
    """Yields the error of every quantized linear in ``seen``, and its quantized input."""
    for x, weight, bias, got in seen:
        if isinstance(weight, MinifloatTensor):
            x_hat = token_wise(x, weight.act_fmt)
            yield error(x_hat, weight.dequantize(torch.float32).double(), bias, got), x_hat


@torch.no_grad()
def measure(recipe: str, transformer: torch.nn.Module, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table: largest errors over ``samples``."""
    graph = capture(transformer, samples[0])
    prepared = prepare_pt2e(graph, quantizer_for(transformer, recipe))
    for sample in samples:
        prepared(**sample)
    converted = convert_pt2e(prepared)
    lowered = lower(converted)
    worst, reference_worst, step, output, nudged, moved, codes = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
    for sample in samples:
        inputs = _compat.flat_inputs(graph, sample).values()
        step = max(step, step_by_step(converted, lowered, inputs))
        nudged = max(nudged, relative_error(converted(**last_bits_changed(sample))[0], converted(**sample)[0]))
        a, b = Linears(lowered), Linears(converted)
        fast, expected = a.run(*inputs)[0], b.run(*inputs)[0]
        output = max(output, relative_error(fast, expected))
        pairs = [pair for pair in zip(a.seen, b.seen, strict=True) if isinstance(pair[0][1], MinifloatTensor)]
        for (found, x_hat), (_, (x, weight, bias, got)) in zip(
            lowered_errors([p[0] for p in pairs]), pairs, strict=True
        ):
            worst = max(worst, found)
            reference_worst = max(reference_worst, error(x.double(), weight.double(), bias, got))
            moved += int(((x_hat - x).abs() > 1e-3 * x.abs().amax(-1, keepdim=True)).sum())
            codes += x.numel()
    return {
        "recipe": recipe,
        "linear": worst,
        "linear_converted": reference_worst,
        "step": step,
        "model": output,
        "nudged": nudged,
        "codes_moved": moved / codes,
    }


@torch.no_grad()
def step_by_step(converted: GraphModule, lowered: GraphModule, inputs: Iterable[Any]) -> float:
    """Largest difference of any step of ``lowered`` on the inputs that it has in ``converted``; see :class:`SameInputs`."""
    expected = Values(converted)
    expected.run(*inputs)
    same = SameInputs(lowered, expected.values)
    same.run(*inputs)
    return same.worst


def last_bits_changed(sample: Mapping[str, Any]) -> dict[str, Any]:
    """``sample`` with the next larger number in place of each of its latents."""
    latents = sample["hidden_states"]
    return {**sample, "hidden_states": torch.nextafter(latents, torch.full_like(latents, torch.inf))}


def main(
    recipes: Annotated[str, typer.Option(help="Comma-separated.")] = "w4a6,w4a6_auto,w4a8,int_w4a6",
    samples: int = 4,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measures and prints."""
    from diffusers import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(reference.path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    data = collect_samples(pipe, reference.prompts()[:8], samples=samples, **reference.generation())
    rows = [measure(recipe, pipe.transformer, data) for recipe in recipes.split(",")]
    lines = [
        "| recipe | lowered linear vs float64 | converted linear vs float64 | any step, same inputs "
        "| whole model, lowered vs converted | converted vs itself, last bits of the latents changed "
        "| activation codes that moved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['recipe']}` | {row['linear']:.1e} | {row['linear_converted']:.1e} | {row['step']:.1e} "
            f"| {row['model']:.1e} | {row['nudged']:.1e} | {row['codes_moved']:.4%} |"
        )
    print("\n".join(lines))
    write_text(out / "exactness.json", json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    write_text(out / "exactness.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
