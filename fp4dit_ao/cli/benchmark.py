"""``fp4dit-ao benchmark``: a Markdown report of speed, memory and error, compared with floats and other packages."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fp4dit_ao.benchmark import attention, linears, report, sections
from fp4dit_ao.benchmark.bars import Results
from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.benchmark.sections import Settings, StepCase
from fp4dit_ao.benchmark.turns import Measured
from fp4dit_ao.benchmark.verdict import verdict
from fp4dit_ao.calibration import read_prompts
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.util.atomic_files import write_text

PARTS = ("linears", "attention", "transformer", "generation")
SIZES: dict[str, dict[str, list[str]]] = {
    "quick": {"linear": ["4608x1152:16,256+peers"], "transformer": ["256x1"]},
    "standard": {
        "linear": ["pixart-xl:1,16,256,1024,4096", "4608x1152:16,1024+peers", "12288x3072:1024+peers"],
        "transformer": ["512x4", "512x1+peers"],
    },
    "full": {
        "linear": ["pixart-xl:1,16,256,1024,4096+peers", "hunyuan-dit:1024+peers", "flux:1024+peers"],
        "transformer": ["512x28", "512x2+peers", "1024x4"],
    },
    "cuda": {
        "linear": [f"{name}:16,256,1024,4096,16384" for name in linears.SHAPES] + ["12288x3072:16,4096+peers"],
        "transformer": ["512x28", "1024x28+peers"],
    },
}
"""Cases that are measured by default, by ``--size``; on a GPU "cuda" replaces "standard" and "full"."""


def benchmark(
    model: str, *, parts: Sequence[str], recipes: Sequence[str], peers: Sequence[str], linear: Sequence[str],
    transformer: Sequence[str], size: str, batch_size: int, steps: int | None, prompts: Path | None, rounds: int,
    model_rounds: int, at_once: int, device: str | None, out: Path,
) -> None:  # fmt: skip
    """Measures, prints Markdown, and writes it beside the JSON ``out``; see ``fp4dit-ao benchmark --help``."""
    for recipe in recipes:
        QuantConfig.from_name(recipe)
    parts = _known("part", parts, PARTS)
    chosen = bool(peers)
    peers = [] if list(peers) == ["none"] else _known("peer", peers, list(PEERS))
    device = device or named_models.default_device()
    _known("size", [size], ("quick", "standard", "full"))
    sizes = SIZES[size if size == "quick" or torch.device(device).type == "cpu" else "cuda"]
    linear, transformer = linear or sizes["linear"], transformer or sizes["transformer"]
    linear_cases = [linears.cases(text) for text in linear]
    step_cases = [StepCase.parse(text) for text in transformer]
    texts = _prompts(model, prompts, batch_size) if "generation" in parts else []
    call: dict[str, object] = {} if steps is None else {"num_inference_steps": steps}
    each = Settings(tuple(recipes), tuple(peers), device, torch.get_num_threads(), rounds, at_once)
    few = replace(each, rounds=model_rounds)
    asked = {
        "size": size, "parts": parts, "recipes": list(recipes), "peers": peers, "linear": linear, "transformer": transformer,
        "model": model, "batch size": batch_size, "steps": steps, "rounds": rounds, "model rounds": model_rounds,
        "device": device,
    }  # fmt: skip
    results = Results(asked, environment())

    def collect(found: list[Measured], measured: Iterable[Measured]) -> None:
        for one in measured:
            found.append(one)

    try:
        with tqdm(bar_format="{elapsed} {desc}") as bar:
            if "linears" in parts:
                bar.set_description_str("ceilings")
                results.ceilings = sections.ceilings(each)
                collect(results.linears, sections.measure_call(each, bar.set_description_str))
                for some, beside in linear_cases:
                    collect(results.linears, sections.measure_linears(each, some, beside, bar.set_description_str))
            if "attention" in parts:
                cases = attention.CASES[:1] if size == "quick" else attention.CASES
                collect(results.attention, sections.measure_attention(each, cases, bar.set_description_str))
            if "transformer" in parts:
                for case in step_cases:
                    collect(results.steps, sections.measure_step(few, case, bar.set_description_str))
            if "generation" in parts:
                beside = chosen or size == "full"
                measured = sections.measure_generation(few, model, texts, call, beside, bar.set_description_str)
                collect(results.generations, measured)
            bar.set_description_str("done")
    finally:
        if results.linears or results.attention or results.steps or results.generations:  # also if interrupted
            text = report.markdown(results)
            print(text)
            write_text(out, json.dumps(report.to_dict(results), indent=1) + "\n")
            write_text(out.with_suffix(".md"), text)
            print(f"every time: {out}; this report: {out.with_suffix('.md')}")
            if sentence := verdict(results):
                print(sentence)


def _known(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """``names``, or all of ``known`` if there are none; raises ``ValueError`` for an unknown one."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown --{kind} {name!r}; choose among {', '.join(known)}")
    return list(names or known)


def _prompts(model: str, prompts: Path | None, count: int) -> list[str]:
    named_models.folder_of(model)
    texts = read_prompts(prompts) if prompts else named_models.default_prompts(model, count)
    return [texts[index % len(texts)] for index in range(count)]
