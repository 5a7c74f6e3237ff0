"""Quantization of a model that is bigger than memory: ``python -m benchmarks.bigger_than_memory``.

Writes a pipeline whose transformer has random bfloat16 weights in shards, and quantizes it in processes that have less memory
than it takes: to nearest, while ``from_pretrained`` reads it, by ``quantize_pipeline``, and by ``fp4dit-ao quantize``; or, with
``--way command --rounding gptq``, say, on data, unit by unit. Prints the most anonymous memory that each took beyond what the
small reference pipeline had left, beside the bound: to nearest the quantized size and twice the largest tensor, else what
``--given`` allows.
"""

import functools
import gc
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import limited_memory
from fp4dit_ao import reference
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.freed_memory import WORTH_IT, return_freed
from fp4dit_ao.util.mapped_files import anonymous_bytes

GB = 10**9
WEIGHTS = "diffusion_pytorch_model"
WAYS = ("from_pretrained", "quantize_pipeline", "command")
"""Ways to quantize, each in a process of its own."""
PROMPT = "a red square"
NEAREST = "nearest"


@dataclass(frozen=True)
class Method:
    """How weights are rounded.

    Attributes:
        recipe: name of the recipe.
        rounding: name of the rounding, which is not nearest for the command alone.
        scope: what is rounded together.
        iters: iterations of learned rounding; 0 for a rounding that has none.
        given: bytes that the command's ``--memory`` gives it beyond what modules have taken; 0 for no limit.
    """

    recipe: str
    rounding: str = NEAREST
    scope: str = "block"
    iters: int = 0
    given: int = 0

    def arguments(self) -> list[str]:
        """Arguments of the command."""
        found = ["--recipe", self.recipe, "--rounding", self.rounding, "--dtype", "bfloat16"]
        if self.rounding != NEAREST:
            found += ["--scope", self.scope, "--samples", "4", "--steps", "2", "--batch-size", "2"]
        if self.iters:
            found += ["--iters", str(self.iters)]
        if self.given:
            found += ["--memory", str(anonymous_bytes() + self.given)]
        return found


@dataclass(frozen=True)
class Large:
    """A pipeline on disk.

    Attributes:
        folder: of the pipeline.
        nbytes: of the transformer's tensors.
        largest: of its largest tensor.
    """

    folder: Path
    nbytes: int
    largest: int


def make(folder: Path, nbytes: float, width: int, shard: float, seed: int = 0) -> Large:
    """Writes the reference pipeline with another transformer, of random bfloat16 weights, a file at a time in memory.

    Tensors of one shape are equal, so that making them does not take longer than the rest.

    Args:
        folder: to write.
        nbytes: of the transformer, about: whole blocks.
        width: of its tokens.
        shard: bytes of a file, about.
        seed: of the weights.
    """
    shutil.copytree(reference.path(), folder, ignore=_without_transformer)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": width // config["attention_head_dim"], "cross_attention_dim": width}
    one, two = (_sizes(config | {"num_layers": layers}) for layers in (1, 2))
    block = sum(two.values()) - sum(one.values())
    config["num_layers"] = max(1, round((nbytes - sum(one.values())) / block) + 1)
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2))
    sizes = _sizes(config)
    _write(config, folder / "transformer", shard, seed)
    return Large(folder, sum(sizes.values()), max(sizes.values()))


def _without_transformer(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder).name == "transformer" and name.startswith(WEIGHTS)]


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    return {name: 2 * x.numel() for name, x in empty_model(config).state_dict().items()}


def _write(config: dict[str, Any], folder: Path, shard: float, seed: int) -> None:
    files: list[list[str]] = [[]]
    shapes = {name: x.shape for name, x in empty_model(config).state_dict().items()}
    filled = 0
    for name, shape in shapes.items():
        if filled >= shard:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += 2 * shape.numel()
    names = [f"{WEIGHTS}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    generator = torch.Generator().manual_seed(seed)

    @functools.cache
    def drawn(shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    for file, inside in zip(names, files, strict=True):
        tensors: dict[str, Tensor] = {name: drawn(shapes[name]).clone() for name in inside}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, inside in zip(names, files, strict=True) for name in inside},
    }
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))


def quantize(way: str, method: Method, folder: Path, out: Path) -> None:
    """Quantizes the pipeline in ``folder``, and saves its transformer (the command: all of it) to ``out``."""
    recipe = method.recipe
    if way == "from_pretrained":
        from diffusers import PixArtTransformer2DModel

        from fp4dit_ao import FP4DiTConfig

        model = PixArtTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", quantization_config=FP4DiTConfig(recipe), torch_dtype=torch.bfloat16
        )
        model.save_pretrained(out / "transformer")
    elif way == "quantize_pipeline":
        from fp4dit_ao import quantize_pipeline
        from fp4dit_ao.diffusers_integration.named_models import open_pipeline

        pipe = open_pipeline(str(folder), "cpu", dtype="bfloat16")
        quantized = quantize_pipeline(pipe, recipe, prompts=[PROMPT], rounding="nearest", progress=False)
        quantized.transformer.save_pretrained(out / "transformer")
    else:
        from fp4dit_ao.cli.app import app

        prompts = out.with_name(f"{out.name}.txt")
        prompts.write_text(f"{PROMPT}\n")
        arguments = ["--prompts", str(prompts), "--out", str(out), *method.arguments()]
        if app(["quantize", str(folder), *arguments], standalone_mode=False):
            raise RuntimeError("the command failed")


def child(way: str, method: str, folder: str, out: str) -> None:
    """Quantizes the model, in the process whose memory is limited; prints JSON as its last line.

    First it does the same to the small reference pipeline: torch.export alone imports some hundred MB of modules.
    """
    how = Method(**json.loads(method))
    with tempfile.TemporaryDirectory() as small:
        quantize(way, replace(how, given=0), reference.path(), Path(small) / "out")
    gc.collect()
    return_freed(WORTH_IT)
    began = time.perf_counter()
    with limited_memory.Peak() as peak:
        quantize(way, how, Path(folder), Path(out))
    seconds = time.perf_counter() - began
    print(json.dumps({"before": peak.before, "peak": peak.bytes, "added": peak.added, "seconds": seconds}))


def measured(large: Large, way: str, method: Method, limit: float, out: Path) -> dict[str, Any]:
    """One row: memory and time of one way, in a process that is given ``limit`` bytes.

    Raises:
        RuntimeError: it failed, such as by needing more.
    """
    code = "import sys; from benchmarks.bigger_than_memory import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, way, json.dumps(asdict(method)), str(large.folder), str(out)]
    done, by = limited_memory.run(command, int(limit))
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode} in {limit / GB:.1f} GB: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    quantized = sum(path.stat().st_size for path in (out / "transformer").glob("*.safetensors"))
    bound = method.given or quantized + 2 * large.largest
    return {
        "way": way,
        "recipe": method.recipe,
        "rounding": method.rounding,
        "limited by": by,
        "limit": int(limit),
        "quantized": quantized,
        "bound": bound,
    } | found


def table(large: Large, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| | recipe, rounding | process limited to | by | quantized | bound | peak, added | peak in all | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        limit, *sizes = (f"{row[name] / GB:.3f} GB" for name in ("limit", "quantized", "bound", "added", "peak"))
        found = f"{limit} | {row['limited by'] or 'nothing'} | {' | '.join(sizes)} | {row['seconds']:.0f}"
        yield f"| {row['way']} | `{row['recipe']}`, {row['rounding']} | {found} |"
    yield ""
    yield f"Float weights: {large.nbytes / GB:.3f} GB in bfloat16, the largest tensor {large.largest / 1e6:.1f} MB."


def main(
    size: Annotated[float, typer.Option(help="GB of float weights.")] = 6,
    memory: Annotated[float, typer.Option(help="GB that a process may take, page cache included.")] = 4,
    width: Annotated[int, typer.Option(help="Width of the transformer; more layers if less.")] = 4096,
    shard: Annotated[float, typer.Option(help="GB of a file.")] = 1,
    recipe: Annotated[list[str], typer.Option(help="Repeatable.")] = ["w4a6"],  # noqa: B006
    rounding: Annotated[str, typer.Option(help="With --way command, also one that looks at data.")] = NEAREST,
    scope: Annotated[str, typer.Option(help="What such a rounding rounds together.")] = "block",
    iters: Annotated[int, typer.Option(help="Iterations of a learned rounding; 0 for one that has none.")] = 0,
    given: Annotated[
        float, typer.Option(help="GB that such a rounding may take beyond modules (--memory of the command).")
    ] = 0,
    way: Annotated[list[str], typer.Option(help="Repeatable.")] = list(WAYS),  # noqa: B006
    out: Path = Path("benchmarks/results/bigger-than-memory.json"),
) -> None:
    """Writes the model into a temporary folder, measures and prints."""
    if rounding != NEAREST and way != ["command"]:
        raise typer.BadParameter(f"--rounding {rounding} is for --way command alone")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        root = Path(folder)
        large = make(root / "float", size * GB, width, shard * GB)
        rows = []
        for each, name in itertools.product(way, recipe):
            method = Method(name, rounding, scope, iters, int(given * GB))
            rows.append(measured(large, each, method, memory * GB, root / "quantized"))
            shutil.rmtree(root / "quantized")
    print("\n".join(table(large, rows)))
    write_text(out, json.dumps({"environment": environment(), "bytes": large.nbytes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
