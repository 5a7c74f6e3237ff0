"""The tables of FP4DiT and of deepcompressor, by their protocols: ``python benchmarks/paper_table.py NAME --help``.

Quantizes every row, draws, judges and prints, resuming what an earlier run has finished. It needs the model's weights, the
prompts and the real images; ``reference`` needs nothing and shows on the pipeline that ships that the whole of it runs.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from fp4dit_ao import reference
from fp4dit_ao.cli.evaluate import OutputFiles, Procedure, WantedImages, evaluate
from fp4dit_ao.cli.quantize import Methods, quantize
from fp4dit_ao.config import Fields
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.image_metrics import open_metrics
from fp4dit_ao.evaluation.prompt_sets import LINES, Prompt, read_prompt_set
from fp4dit_ao.util.atomic_files import write_text

EVERYTHING = ("clip", "image_reward", "hpsv2", "lpips", "fid", "kid", "cmmd")


@dataclass(frozen=True)
class Row:
    """One quantized row: recipe, methods, and changes of the recipe; by default FP4DiT's own rounding."""

    recipe: str
    methods: Methods = field(default_factory=lambda: Methods("scale_aware", iters=2500))
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """One published table.

    Attributes:
        model: hub id of the model, or ``reference``.
        source: where the protocol is from, and what of it is not published.
        wanted: how prompts are read, how many, their seeds, and the pipeline's arguments.
        rows: by name; names of ours beside the published ones.
        metrics: of ``fp4dit-ao evaluate``.
        calibration: prompts that rows are calibrated on, none of which is drawn.
        samples: calibration samples.
        dtype: in which everything that is not quantized runs.
        real: file of a prompt's real image in the folder of real images, as a glob; None if there are none.
    """

    model: str
    source: str
    wanted: WantedImages
    rows: Mapping[str, Row]
    metrics: tuple[str, ...] = EVERYTHING
    calibration: int = 128
    samples: int = 2560
    dtype: str = "float16"
    real: Callable[[Prompt], str] | None = None


def _coco_image(prompt: Prompt) -> str:
    return f"COCO_val2014_{int(prompt.name.partition('-')[0]):012d}.jpg"


def _mjhq_image(prompt: Prompt) -> str:
    return f"*/{prompt.name}.jpg"


FP4DIT = {
    "pixart-alpha": ("PixArt-alpha/PixArt-XL-2-512x512", "e2m1"),
    "pixart-sigma": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "e1m2"),
    "hunyuan": ("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", "e2m1"),
}
"""FP4DiT's models, and the format of their weights but before GELU."""


def _fp4dit(model: str, weight: str, preferences: bool) -> Protocol:
    """On COCO's captions; or on HPSv2's prompts, which have no real images."""
    wanted = WantedImages(
        prompt_set="hpsv2" if preferences else "coco", count=3200 if preferences else 10_000, seeds=(42,), seeding="same",
        call={"num_inference_steps": 20},
    )  # fmt: skip
    return Protocol(
        model,
        "FP4DiT, arXiv 2503.15465, section 5 and released code: 10 000 captions of COCO's validation set, and HPSv2's prompts; "
        "seed 42 before every image, the pipeline's own 20 steps and guidance, calibration on 128 captions of COCO. Which "
        "captions is not published: the file's order is taken here.",
        wanted,
        {
            "W4A8": Row("w4a8", fields={"weight": weight}),
            "W4A6": Row("w4a6", fields={"weight": weight}),
            "W4A6, codebook groups": Row("w4a6_codebook", Methods("gptq")),
            "INT4/INT6, AdaRound": Row("int_w4a6", Methods("adaround", iters=20_000)),
        },
        metrics=("clip", "image_reward", "hpsv2", "lpips") if preferences else EVERYTHING,
        real=None if preferences else _coco_image,
    )


def protocols() -> dict[str, Protocol]:
    """All protocols by name."""
    svdquant = Methods("gptq", transforms=("smoothquant", "low_rank"))
    return {
        **{f"fp4dit-{name}": _fp4dit(*row, preferences=False) for name, row in FP4DIT.items()},
        **{f"fp4dit-{name}-hpsv2": _fp4dit(*row, preferences=True) for name, row in FP4DIT.items()},
        "deepcompressor": Protocol(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "deepcompressor, examples/diffusion: 5000 prompts of MJHQ-30K by random.Random(0).shuffle, generators seeded by "
            "the prompt's name, 20 steps, guidance 4.5; FID against MJHQ's images of these prompts.",
            WantedImages(
                prompt_set="mjhq", count=5000, sample="shuffled", seeds=(0,), seeding="name",
                call={"num_inference_steps": 20, "guidance_scale": 4.5},
            ),
            {
                "NVFP4, nearest": Row("nvfp4", Methods("nearest")),
                "NVFP4, GPTQ": Row("nvfp4", Methods("gptq")),
                "NVFP4, SVDQuant": Row("nvfp4", svdquant),
                "W4A6": Row("w4a6"),
                "W4A6, codebook groups": Row("w4a6_codebook", Methods("gptq")),
            },
            real=_mjhq_image,
        ),
        "reference": Protocol(
            named_models.REFERENCE,
            "This package's own pipeline and prompts: no published table.",
            WantedImages(count=200, call={"num_inference_steps": 20}),
            {
                "W4A6, nearest": Row("w4a6", Methods("nearest")),
                "W4A6": Row("w4a6", Methods("scale_aware", iters=400)),
                "W4A6, codebook groups": Row("w4a6_codebook", Methods("gptq")),
            },
            metrics=(),
            calibration=64,
            samples=1280,
            dtype="stored",
        ),
    }  # fmt: skip


@dataclass
class Run:
    """One table; everything that is finished is kept in ``work``."""

    protocol: Protocol
    work: Path
    model: str
    wanted: WantedImages
    dtype: str
    device: str | None = None
    samples: int | None = None
    iters: int | None = None
    calibrate_on: Path | None = None
    texts: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = self.wanted.texts(self.model)

    def calibration(self) -> Path:
        """File of the prompts that rows are calibrated on."""
        if self.calibrate_on is not None:
            return self.calibrate_on
        drawn = {prompt.text for prompt in self.texts}
        if self.wanted.prompts is None:
            every = reference.prompts()
        else:
            every = [prompt.text for prompt in read_prompt_set(self.wanted.prompt_set, self.wanted.prompts)]
        rest = [" ".join(text.split()) for text in dict.fromkeys(every) if text not in drawn]
        if not rest:
            raise ValueError("no prompts are left to calibrate on: all are drawn; give others: --calibration FILE")
        path = self.work / "calibration.txt"
        write_text(path, "\n".join(rest[: self.protocol.calibration]) + "\n")
        return path

    def quantized(self, name: str, row: Row) -> str:
        """Folder of a row's pipeline, made now unless an earlier run with the same settings has."""
        methods, calibration = row.methods, self.calibration()
        if self.iters is not None and methods.iters is not None:
            methods = replace(methods, iters=self.iters)
        samples = self.samples or self.protocol.samples
        settings = (
            self.model, row.recipe, methods, sorted(row.fields.items()), samples, self.dtype, self.wanted.call,
            calibration.read_text(encoding="utf-8"),
        )  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]
        folder = self.work / "models" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{digest}"
        if not (folder / "model_index.json").exists():
            quantize(
                self.model, folder, recipe=row.recipe, prompts=calibration, methods=methods, skip=(),
                call=self.wanted.call, samples=samples, seed=0, resume=True, device=self.device, dtype=self.dtype,
                fields=row.fields, layers={},
            )  # fmt: skip
        return str(folder)

    def real(self, folder: Path | None) -> Path | None:
        """Folder of links to the real images of the drawn prompts; ``folder`` itself where files are not named by prompts.

        Raises:
            FileNotFoundError: one is not in ``folder``.
        """
        if self.protocol.real is None or folder is None:
            return folder
        found = self._emptied("real")
        for prompt in self.texts:
            name = self.protocol.real(prompt)
            image = next(folder.glob(name), None)
            if image is None:
                raise FileNotFoundError(f"there is no {name} in {folder}, which the prompt {prompt.name} belongs to")
            (found / image.name).symlink_to(image.resolve())
        return found

    def pictures(self) -> Path:
        """The reference pipeline's true pictures, as files."""
        folder, known = self._emptied("pictures"), reference.pictures()
        for index in named_models.known_prompts([prompt.text for prompt in self.texts]) or []:
            Image.fromarray(known[index]).save(folder / f"{index}.png")
        return folder

    def _emptied(self, name: str) -> Path:
        """A new folder in ``work``, without what an earlier run with other prompts put there."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def main(
    table: Annotated[str, typer.Argument(help="Protocol: see --list.")] = "reference",
    prompts: Annotated[Path | None, typer.Option(help="captions_val2014.json, or MJHQ-30K's meta_data.json.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Prompts to calibrate on, one a line; the set's first that are not drawn if not given."),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="val2014, or MJHQ-30K's images, unpacked.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder with the weights; the published hub id if not given.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="NAME=WEIGHTS where weights are not cached, or other metrics; repeatable.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Names of rows, separated by semicolons, or 'all'.")] = "all",
    work: Annotated[Path, typer.Option(help="Where all that is finished is kept.")] = Path("outputs/paper"),
    dtype: Annotated[
        str | None, typer.Option(help="Type of all that is not quantized; the protocol's if not given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where rows are quantized.")] = None,
    devices: Annotated[str | None, typer.Option(help="Where images are drawn, such as cuda:0,cuda:1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 8,
    count: Annotated[int | None, typer.Option(min=2, help="Fewer prompts: not the protocol.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Other steps: not the protocol.")] = None,
    iters: Annotated[int | None, typer.Option(min=1, help="Shorter learned rounding: not the protocol.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Fewer calibration samples: not the protocol.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Print the protocols and stop.")] = False,
) -> None:
    """Prints a published table's rows and ours, measured by its protocol; JSON, HTML and images are in --work."""
    known = protocols()
    if list_all:
        for name, protocol in known.items():
            print(f"{name}: {protocol.model}; rows {'; '.join(protocol.rows)}\n  {protocol.source}")
        return
    if table not in known:
        raise typer.BadParameter(f"no table {table}; there are {', '.join(known)}")
    protocol, work = known[table], work / table
    if protocol.wanted.prompt_set != LINES and prompts is None:
        raise typer.BadParameter(f"{table} needs --prompts FILE of the prompt set {protocol.wanted.prompt_set}")
    chosen = list(protocol.rows) if rows == "all" else rows.split(";")
    if unknown := [name for name in chosen if name not in protocol.rows]:
        raise typer.BadParameter(f"no row {unknown[0]}; there are {'; '.join(protocol.rows)}")
    call = protocol.wanted.call | ({} if steps is None else {"num_inference_steps": steps})
    wanted = replace(protocol.wanted, prompts=prompts, count=count or protocol.wanted.count, call=call)
    run = Run(
        protocol, work, model or protocol.model, wanted, dtype or protocol.dtype, device, samples, iters, calibration
    )
    given = {one.partition("=")[0]: one for one in metric or ()}
    metrics = [given.pop(name, name) for name in protocol.metrics] + list(given.values())
    true = run.pictures() if table == "reference" and real is None else run.real(real)
    open_metrics(metrics, "cpu")  # what is missing is said before hours of quantizing, not after
    models = {run.quantized(name, protocol.rows[name]): name for name in chosen}
    drawn_on = tuple(devices.split(",")) if devices else (device,)
    how = Procedure(batch_size, devices=drawn_on, dtype=run.dtype, metrics=tuple(metrics), real=true)
    print(f"{table}: {protocol.source}\n")
    places = OutputFiles(work / "table.json", work / "table.html", work / "images")
    evaluate(list(models), run.model, wanted, how, places, models | {run.model: "original"})


if __name__ == "__main__":
    typer.run(main)
