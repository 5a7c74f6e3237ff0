"""``fp4dit-ao evaluate``: how close a quantized pipeline's images are to the original's, as a table, as JSON and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fp4dit_ao.cli.drawing import Drawing
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.baseline_variance import other_way
from fp4dit_ao.evaluation.drawing import seconds_per_image
from fp4dit_ao.evaluation.fidelity import Comparison, Evaluation, Fidelity
from fp4dit_ao.evaluation.image_metrics import ImageMetric, open_metrics
from fp4dit_ao.evaluation.judging import Judge
from fp4dit_ao.evaluation.kept_images import KeptImages, folder_of_images
from fp4dit_ao.evaluation.prompt_sets import LINES, Prompt, read_prompt_set, shuffled
from fp4dit_ao.evaluation.report import SHOWN, write_report
from fp4dit_ao.evaluation.seeding import seeding

SAMPLES = ("first", "shuffled")


@dataclass(frozen=True)
class WantedImages:
    """Images to draw.

    Attributes:
        prompts: file or folder of a prompt set; the reference pipeline's own prompts if None.
        prompt_set: how it is read.
        count: prompts to use.
        sample: which: the ``first``, or ``shuffled`` as deepcompressor does.
        seeds: an image of every prompt for each.
        seeding: how a seed becomes a generator's.
        call: arguments of the pipeline.
    """

    prompts: Path | None = None
    prompt_set: str = LINES
    count: int = 100
    sample: str = "first"
    seeds: tuple[int, ...] = (0, 1, 2)
    seeding: str = "distinct"
    call: dict[str, object] = field(default_factory=dict)

    def texts(self, against: str) -> list[Prompt]:
        """The prompts."""
        if self.sample not in SAMPLES:
            raise ValueError(f"unknown --sample {self.sample!r}; choose one of {', '.join(SAMPLES)}")
        seeding(self.seeding)
        if self.prompts is None:
            return [Prompt(text, str(n)) for n, text in enumerate(named_models.default_prompts(against, self.count))]
        found = read_prompt_set(self.prompt_set, self.prompts)
        return found[: self.count] if self.sample == "first" else shuffled(found, self.count)


@dataclass(frozen=True)
class Procedure:
    """Settings of drawing and judging.

    Attributes:
        batch_size: images drawn together.
        compile: whether quantized transformers run under ``torch.compile``.
        devices: a shard of the images is drawn on each; the default device if None.
        shard: ``(k, n)`` draws one of ``n`` parts, itself shared out over the devices, and judges nothing.
        dtype: see :func:`named_models.open_pipeline`.
        baseline: other ways to draw the original, by name.
        metrics: ``NAME`` or ``NAME=WEIGHTS``.
        real: folder of real images.
    """

    batch_size: int = 16
    compile: bool = False
    devices: tuple[str | None, ...] = (None,)
    shard: tuple[int, int] | None = None
    dtype: str = named_models.STORED
    baseline: tuple[str, ...] = ("batch",)
    metrics: tuple[str, ...] = ()
    real: Path | None = None


@dataclass(frozen=True)
class OutputFiles:
    """Files to write.

    Attributes:
        json: every number of every image.
        report: the page; none if None.
        images: folder of the images.
        shown: images of each variant on the page.
    """

    json: Path
    report: Path | None
    images: Path
    shown: int = SHOWN


def evaluate(
    models: Sequence[str],
    against: str,
    wanted: WantedImages,
    procedure: Procedure,
    files: OutputFiles,
    labels: Mapping[str, str] | None = None,
) -> Evaluation | None:
    """Draws with ``against`` and ``models``, prints the tables, writes JSON and page; None if only a part is drawn.

    Args:
        models: names of pipelines.
        against: that of the original.
        wanted: prompts, seeds and arguments of the pipeline.
        procedure: how images are drawn and judged.
        files: what is written.
        labels: rows of the tables, by name of a pipeline; :func:`short_names` if not given.
    """
    for name in (against, *models):
        named_models.folder_of(name)
    prompts = wanted.texts(against)
    labels = short_names([against, *models]) | dict(labels or {})
    drawings = _drawings(models, against, labels, prompts, wanted, procedure, files)
    if procedure.shard is None:  # what is missing is said before hours of drawing, not after
        if any(drawing.kept().missing() for drawing in drawings):
            open_metrics(procedure.metrics, "cpu")
        if procedure.real is not None:
            folder_of_images(procedure.real)
    if procedure.shard is not None:
        for drawing in drawings:
            drawing.draw_on(procedure.devices, procedure.shard)
        print(
            f"drawn: part {procedure.shard[0] + 1} of {procedure.shard[1]}, in {files.images}; run without --shard to judge"
        )
        return None
    for drawing in drawings:
        drawing.draw_on(procedure.devices)
    kept = [drawing.kept() for drawing in drawings]
    metrics = open_metrics(procedure.metrics, procedure.devices[0] or named_models.default_device())
    texts = [prompt.text for prompt in prompts]
    evaluation = _judged(drawings, kept, texts, metrics, wanted, procedure)
    print(evaluation.markdown())
    print("Megabytes count everything that is not quantized at 16 bits.")
    evaluation.save(files.json)
    print(f"image by image: {files.json}")
    if files.report is not None:
        better = {metric.title: metric.higher_is_better for metric in metrics}
        write_report(files.report, evaluation, kept, texts, wanted.seeds, better, files.shown)
        print(f"images, worst first: {files.report}")
    return evaluation


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Last folder of each name that is a folder, unless two would be the same; other names are as they are."""
    short = {name: Path(name).name if Path(name).is_dir() else name for name in names}
    return {name: one if list(short.values()).count(one) == 1 else name for name, one in short.items()}


def _drawings(
    models: Sequence[str], against: str, labels: Mapping[str, str], prompts: Sequence[Prompt], wanted: WantedImages,
    procedure: Procedure,
    files: OutputFiles,
) -> list[Drawing]:  # fmt: skip
    """The original, the models, then the original in other ways."""

    def drawing(model: str, label: str, other: str | None = None) -> Drawing:
        return Drawing(
            model, label, files.images, tuple(prompts), wanted.seeds, wanted.seeding, wanted.call,
            procedure.batch_size, procedure.compile,
            procedure.dtype, other,
        )  # fmt: skip

    found = [drawing(name, labels[name]) for name in dict.fromkeys((against, *models))]
    for name in procedure.baseline:
        own = drawing(against, "", name)
        found.append(drawing(against, f"{labels[against]}, {other_way(name).label.format(batch=own.batch)}", name))
    return found


def _judged(
    drawings: Sequence[Drawing], kept: Sequence[KeptImages], texts: list[str], metrics: Sequence[ImageMetric],
    wanted: WantedImages,
    procedure: Procedure,
) -> Evaluation:  # fmt: skip
    against = drawings[0].model
    indices = named_models.known_prompts(texts) if named_models.is_reference(against) else None
    judge = Judge(kept[0], texts, metrics, procedure.real, indices)
    variants: list[Fidelity] = []
    for drawing, images in zip(drawings, kept, strict=True):
        facts = drawing.facts()
        notes = {"bits / weight": f"{facts['bits']:.2f}", "transformer, MB": f"{facts['bytes'] / 1e6:.2f}"}
        variants.append(judge.judge(drawing.label, images, seconds_per_image(images), notes))
    settings: dict[str, object] = {
        "prompts": len(texts),
        "seeds": len(wanted.seeds),
        "batch size": procedure.batch_size,
    }
    settings |= {name: value for name, value in wanted.call.items() if name != "num_inference_steps"}
    settings |= {"steps": drawings[0].facts()["steps"]}
    settings |= {"prompt set": wanted.prompt_set, "seeding": wanted.seeding} if wanted.prompts is not None else {}
    names = [drawing.model for drawing in drawings[1:] if drawing.other is None]
    settings |= {"model": ", ".join(names), "against": against, "prompt texts": texts}
    original, models = variants[0], [v for v, d in zip(variants, drawings, strict=True) if d.other is None][1:]
    others = [v for v, d in zip(variants, drawings, strict=True) if d.other is not None]
    comparisons = [Comparison.of(model, other) for model in models for other in (original, *others)]
    comparisons = [c for c in comparisons if c.psnr is not None or c.scores or c.accuracy is not None]
    return Evaluation(variants, settings, comparisons, digits=judge.digits())


def shard_of(text: str | None) -> tuple[int, int] | None:
    """``(k, n)`` from ``"k/n"``.

    Raises:
        ValueError: it is not spelled so, or ``k`` is not below ``n``.
    """
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise ValueError(f"--shard {text} is not K/N with K from 0 to N - 1; give, say, --shard 0/4")
    return int(parts[0]), int(parts[1])
