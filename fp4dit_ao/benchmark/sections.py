"""Parts of a benchmark: which variants are measured in which cases. Each yields :class:`Measured` one by one."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp4dit_ao.benchmark import linears, transformers
from fp4dit_ao.benchmark.ceilings import Rates, has_onednn_int8
from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.benchmark.turns import Measured, Progress, Worker, WorkerFailed, measure
from fp4dit_ao.benchmark.variants import FLOATS, Variant
from fp4dit_ao.benchmark.worker import Case

_PACKAGE = "fp4dit_ao.benchmark"
CALL_SIZE = {"out_features": 128, "in_features": 128, "tokens": 1}
"""Size of a linear that takes hardly longer than a call."""
BASE = Variant("bfloat16", "compiled")
"""Baseline of speed ratios."""


@dataclass(frozen=True)
class Settings:
    """Participants and rounds of a benchmark.

    Attributes:
        recipes: our recipes; bars are judged on the first.
        peers: names in ``peers.PEERS``.
        device: device that everything runs on.
        threads: CPU threads of each process.
        rounds: turns of each variant in each case; at least 2 for steps and generations.
        at_once: processes alive at once.
    """

    recipes: tuple[str, ...]
    peers: tuple[str, ...]
    device: str
    threads: int
    rounds: int = 5
    at_once: int = 8

    @property
    def installed(self) -> list[Variant]:
        """Variants of the peers that are installed."""
        return Variant.peers([name for name in self.peers if PEERS[name].installed])


@dataclass(frozen=True)
class StepCase:
    """Size of one denoising step, in pixels and layers, measured with peers or without."""

    pixels: int
    layers: int
    peers: bool = False

    @staticmethod
    def parse(text: str) -> "StepCase":
        """Reads ``512x28`` (pixels, layers), or ``512x2+peers``; raises ``ValueError`` for other texts."""
        size, plus, peers = text.partition("+")
        numbers = size.split("x")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers) or (plus and peers != "peers"):
            raise ValueError(f"unknown step {text!r}; give PIXELSxLAYERS such as 512x28, or 512x2+peers")
        if int(numbers[0]) % 16:
            raise ValueError(f"step {text!r}: {numbers[0]} pixels make no whole patches; give a multiple of 16")
        return StepCase(int(numbers[0]), int(numbers[1]), bool(peers))


def ceilings(settings: Settings) -> Rates:
    """Measures :class:`fp4dit_ao.benchmark.ceilings.Ceilings`."""
    options = {"device": settings.device, "threads": settings.threads, "repeats": settings.rounds}
    worker = Worker(f"{_PACKAGE}.ceilings:Ceilings", options)
    try:
        found: Rates = worker.ask("prepare")
        return found
    finally:
        worker.close()


def _linear(settings: Settings, variant: Variant) -> Worker:
    options = variant.to_dict() | {"device": settings.device, "threads": settings.threads}
    return Worker(f"{_PACKAGE}.linears:Linear", options)


def measure_call(settings: Settings, progress: Progress) -> Iterator[Measured]:
    """Measures our first recipe at :data:`CALL_SIZE`."""
    ours = [Variant(settings.recipes[0], "compiled")]
    yield from measure(
        ours,
        [],
        [CALL_SIZE],
        partial(_linear, settings),
        rounds=settings.rounds,
        at_once=settings.at_once,
        progress=progress,
    )


def measure_linears(settings: Settings, cases: Sequence[Case], peers: bool, progress: Progress) -> Iterator[Measured]:
    """Measures our recipes, eager floats and int8 products alone; with ``peers`` also these and compiled floats."""
    bases = [linears.INT_MM, Variant("float32"), Variant("bfloat16")]
    bases += [linears.ONEDNN] if has_onednn_int8(settings.device) else []
    variants = [Variant(recipe, "compiled") for recipe in settings.recipes]
    variants.append(Variant(settings.recipes[0] + linears.PRODUCT))
    if peers:
        variants += [*(Variant(name, "compiled") for name in FLOATS), *settings.installed]
    yield from measure(
        variants, bases, cases, partial(_linear, settings), rounds=settings.rounds, at_once=settings.at_once, together=True,
        progress=progress,
    )  # fmt: skip


def measure_attention(settings: Settings, cases: Sequence[Case], progress: Progress) -> Iterator[Measured]:
    """Measures PyTorch's attention in both float types, and ours, which quantizes q, k and v."""

    def start(variant: Variant) -> Worker:
        options = variant.to_dict() | {"device": settings.device, "threads": settings.threads}
        return Worker(f"{_PACKAGE}.attention:Attention", options)

    variants = [Variant("float32"), *(Variant(recipe, "compiled") for recipe in settings.recipes)]
    yield from measure(
        variants, [Variant("bfloat16")], cases, start, rounds=settings.rounds, at_once=settings.at_once, together=True,
        progress=progress,
    )  # fmt: skip


def measure_step(settings: Settings, case: StepCase, progress: Progress) -> Iterator[Measured]:
    """Measures one denoising step. Every process has its own compile cache, so that its first call compiles from
    scratch."""
    config = transformers.PIXART_XL | {"num_layers": case.layers}
    options = {"config": config, "pixels": case.pixels}
    yield from _measure_models(
        settings, "Step", "StepFiles", options, {"config": config}, {"layers": case.layers, "pixels": case.pixels}, case.peers,
        progress,
    )  # fmt: skip


def measure_generation(
    settings: Settings, model: str, prompts: list[str], call: Mapping[str, object], peers: bool, progress: Progress
) -> Iterator[Measured]:
    """Measures a pipeline's generation of one batch of images."""
    options = {"model": model, "prompts": prompts, "call": call}
    case = {"model": model, "images": len(prompts)}
    files = options | {"device": settings.device}
    yield from _measure_models(settings, "Generation", "GenerationFiles", files, options, case, peers, progress)


def _measure_models(
    settings: Settings, workload: str, files: str, files_options: Mapping[str, object], options: Mapping[str, object],
    case: Case, peers: bool, progress: Progress,
) -> Iterator[Measured]:  # fmt: skip
    module = f"{_PACKAGE}.transformers"
    recipes = settings.recipes if peers else settings.recipes[:1]
    with tempfile.TemporaryDirectory(prefix="fp4dit-ao-") as folder:
        progress(f"write models for {workload.lower()}")
        writer = Worker(f"{module}:{files}", {"folder": folder, "recipes": list(recipes), **files_options})
        try:
            written = writer.ask("prepare")
        except WorkerFailed as error:
            raise RuntimeError(f"the models to measure cannot be made: {error}") from error
        finally:
            writer.close()

        def start(variant: Variant) -> Worker:
            cache = Path(folder, f"cache-{variant.label.replace(' ', '-')}")
            everything = {
                "folder": folder, "reference": str(Path(folder, "float32.safetensors")), "device": settings.device,
                "threads": settings.threads, **options, **variant.to_dict(),
            }  # fmt: skip
            return Worker(f"{module}:{workload}", everything, {"TORCHINDUCTOR_CACHE_DIR": str(cache)})

        ours = [Variant(recipe, "compiled") for recipe in recipes]
        ours.append(Variant(recipes[0], "by block"))
        bases = [Variant("float32", "compiled"), BASE]
        variants = [*bases, Variant("bfloat16", "by block"), *ours]
        if peers:
            variants += [*(Variant(name) for name in FLOATS), *settings.installed]
        for measured in measure(
            variants, bases, [case], start, rounds=settings.rounds, at_once=settings.at_once, progress=progress
        ):
            measured.case = case | written
            yield measured
