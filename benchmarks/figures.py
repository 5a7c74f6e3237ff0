"""Figures of the observations behind FP4DiT, on the reference pipeline: ``python benchmarks/figures.py --out FOLDER``.

``formats.png``  levels of each format
``gelu.png``     distribution of GELU's inputs, and GELU's derivative
``gates.png``    motion of a gate per step of its parameter: INT AdaRound, plain AdaRound in floating point, scale-aware
``tokens.png``   token maxima: spread in every layer, and drift over the timesteps
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from fp4dit_ao import reference
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation import plots
from fp4dit_ao.evaluation.fidelity import generate
from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.passes.reconstruction.rounding.adaround import SHIFT, STRETCH
from fp4dit_ao.reference.statistics import KINDS, kind_of
from fp4dit_ao.util.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


class Recorder:
    """Forward hooks that record token maxima of a transformer's linears per step, and inputs of its GELUs.

    Attributes:
        maxima: largest magnitude of every input token, by kind of layer, then by step.
        before_gelu: a sample of the values that enter GELU, over all steps and blocks.
    """

    def __init__(self, transformer: nn.Module, steps: int):
        self.steps, self.calls = steps, 0
        self.maxima: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in range(steps)])
        self.before_gelu: list[Tensor] = []
        self.hooks = [transformer.register_forward_hook(self._next)]
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                self.hooks.append(module.register_forward_hook(self._linear(kind_of(name))))

    def _next(self, *_: object) -> None:
        self.calls += 1

    def _linear(self, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = self.maxima[kind][self.calls % self.steps]
            found.append(inputs[0].detach().abs().amax(-1).flatten())
            if "before GELU" in kind:
                self.before_gelu.append(output.detach().flatten()[::97].clone())

        return hook

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def by_step(self, kind: str) -> list[NDArray[np.float32]]:
        """Token maxima of all layers of a kind, for each step."""
        return [torch.cat(found).numpy() for found in self.maxima[kind]]


def formats() -> "Figure":
    """Figure 1: INT4 (= E1M2) is uniform; levels crowd toward zero as exponent bits grow."""
    return plots.number_lines(["int4", "e1m2", "e2m1", "e3m0", "int6", "e2m3", "e3m2"])


def gelu(before: NDArray[np.float32]) -> "Figure":
    """Figure 2: the distribution of GELU's inputs, GELU, and its derivative."""
    canvas, axes = plots.figure(8, 3, 1, 2)
    left, right = axes.flat
    limit = float(np.quantile(np.abs(before), 0.999))
    left.hist(before, bins=np.linspace(-limit, limit, 121), density=True)
    negative = float((before < 0).mean())
    left.set(title=f"what reaches GELU ({negative:.0%} negative)", xlabel="value", ylabel="density")
    x = torch.linspace(-limit, limit, 601, requires_grad=True)
    y = nn.functional.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), x)
    right.plot(x.detach(), y.detach(), label="GELU")
    right.plot(x.detach(), slope, label="derivative")
    right.axvspan(-2, 2, color="lightgrey", alpha=0.4, zorder=0)
    right.set(title="GELU bends only near zero", xlabel="value", ylim=(-0.6, 2.5))
    right.legend(fontsize=8)
    return canvas


def gates(fmt: FloatFormat) -> "Figure":
    """Figure 3: each binade's gate against its parameter, and how fast the *weight* moves with it (arXiv 2503.15465,
    3.3)."""
    steps = sorted({float(fmt.element_step(torch.tensor([float(level)]))) for level in fmt.lattice if level > 0})
    span = 4.0
    alpha = torch.linspace(-span * steps[-1], span * steps[-1], 801)

    def gate(v: Tensor) -> Tensor:
        return (STRETCH * torch.sigmoid(v) - SHIFT).clamp(0, 1)

    variants = {
        "INT AdaRound": ([1.0], lambda step: gate(alpha)),
        f"plain AdaRound on {str(fmt).upper()}": (steps, lambda step: gate(alpha)),
        f"scale-aware on {str(fmt).upper()}": (steps, lambda step: gate(alpha / step)),
    }
    canvas, axes = plots.figure(10, 5, 2, 3, sharex=True)
    for column, (title, (own, curve)) in enumerate(variants.items()):
        top, below = axes[:, column]
        for step in own:
            h = curve(step)
            speed = step * torch.gradient(h, spacing=(alpha,))[0]
            top.plot(alpha, h, label=f"step {step:g}")
            below.plot(alpha, speed, label=f"step {step:g}")
        top.set_title(title, fontsize=10)
        below.set_ylim(0, 0.32 * steps[-1])
        below.set_xlabel("learned parameter α, in lattice steps")
        below.legend(fontsize=7)
    axes[0, 0].set_ylabel("gate h")
    axes[1, 0].set_ylabel("d weight / d α")
    return canvas


def tokens(recorder: Recorder, timesteps: list[int]) -> "Figure":
    """Figure 4: within a layer tokens differ, so one range per tensor fails; over the steps the ranges move."""
    kinds = [kind for kind in KINDS.values() if kind in recorder.maxima and ("attention" in kind or "feed" in kind)]
    rows = -(-len(kinds) // 3)
    canvas, axes = plots.figure(10.5, 2.4 * rows, rows, 3)
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax, kind in zip(axes.flat, kinds, strict=False):
        low, first, middle, third, high = np.array([np.quantile(x, QUANTILES) for x in recorder.by_step(kind)]).T
        ax.fill_between(timesteps, low, high, alpha=0.2, color="tab:blue", linewidth=0, label="1 to 99 %")
        ax.fill_between(timesteps, first, third, alpha=0.4, color="tab:blue", linewidth=0, label="25 to 75 %")
        ax.plot(timesteps, middle, color="black", linewidth=1, label="median")
        ax.set_title(kind, fontsize=8)
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=6)
    canvas.supxlabel("timestep (noise on the left)", fontsize=8)
    canvas.supylabel("largest magnitude in a token", fontsize=8)
    return canvas


def summary(recorder: Recorder) -> str:
    """Figure 4 as a table: 99th percentile over median within a step, and range of the median over the steps."""
    rows = []
    for kind in KINDS.values():
        if kind in recorder.maxima:
            steps = recorder.by_step(kind)
            medians = [float(np.median(x)) for x in steps]
            spread = float(np.median([np.quantile(x, 0.99) / np.median(x) for x in steps]))
            rows.append(
                [kind, f"{spread:.2f}", f"{max(medians) / min(medians):.2f}", f"{medians[-1] / medians[0]:.2f}"]
            )
    return markdown_table(
        ["layers", "p99 / median in a step", "largest / smallest median", "last / first median"], rows
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path(__file__).parent / "results" / "figures",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose activations are looked at.")] = 8,
) -> None:
    """Draws the figures and prints the token statistics."""
    pipe = named_models.open_pipeline(named_models.REFERENCE, "cpu")
    steps = int(reference.generation()["num_inference_steps"])
    recorder = Recorder(pipe.transformer, steps)
    texts = named_models.default_prompts(named_models.REFERENCE, prompts)
    generate(pipe, texts, [0], batch_size=prompts, num_inference_steps=steps)
    recorder.remove()
    timesteps = [int(t) for t in pipe.scheduler.timesteps]
    figures = {
        "formats": formats(),
        "gelu": gelu(torch.cat(recorder.before_gelu).numpy()),
        "gates": gates(FloatFormat.parse("e2m1")),
        "tokens": tokens(recorder, timesteps),
    }
    for name, drawn in figures.items():
        plots.save(drawn, out / f"{name}.png")
    print(summary(recorder))
    print(f"pictures: {out}")


if __name__ == "__main__":
    typer.run(main)
