"""Drawing the images of an evaluation: one variant after the other, each on one device or shared out over several."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.baseline_variance import OtherWay, other_way
from fp4dit_ao.evaluation.drawing import draw_missing, missing_batches
from fp4dit_ao.evaluation.environment import versions
from fp4dit_ao.evaluation.kept_images import KeptImages
from fp4dit_ao.evaluation.prompt_sets import Prompt
from fp4dit_ao.evaluation.seeding import seeding
from fp4dit_ao.util.atomic_files import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_FACTS = "facts.json"


class Facts(TypedDict):
    """Columns of a table beside scores: bytes and bits per weight of a pipeline's transformer, and its steps."""

    bytes: int
    bits: float
    steps: int | str


@dataclass(frozen=True)
class Drawing:
    """All that the images of one variant depend on, and where they are kept.

    Attributes:
        model: name of the pipeline; see :func:`named_models.folder_of`.
        label: the variant's name.
        folder: of the images of all variants.
        prompts: what is drawn.
        seeds: one image of every prompt for each.
        seeding: how a seed becomes a generator's; see :data:`fp4dit_ao.evaluation.seeding.SEEDINGS`.
        call: arguments of the pipeline.
        batch_size: images drawn together.
        compile: whether a quantized transformer runs under ``torch.compile``.
        dtype: see :func:`named_models.open_pipeline`.
        other: name of another way to draw the same; see :data:`fp4dit_ao.evaluation.baseline_variance.OTHER_WAYS`.
    """

    model: str
    label: str
    folder: Path
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    seeding: str = "distinct"
    call: dict[str, object] = field(default_factory=dict)
    batch_size: int = 16
    compile: bool = False
    dtype: str = named_models.STORED
    other: str | None = None

    @property
    def way(self) -> OtherWay:
        """How it is drawn."""
        return OtherWay("") if self.other is None else other_way(self.other)

    @property
    def batch(self) -> int:
        """Images drawn together."""
        return self.way.batch(self.batch_size, len(self.prompts) * len(self.seeds))

    def kept(self) -> KeptImages:
        """The images, as far as they are drawn. Another model, prompt, seed, or other argument is another folder."""
        settings: dict[str, object] = {
            "model": self.model, "files": files_of(self.model), "prompts": self.prompts, "seeds": self.seeds,
            "seeding": self.seeding, "call": self.call, "batch size": self.batch, "compile": self.compile,
            "dtype": self.dtype, "other": self.other, "versions": versions(),
        }  # fmt: skip
        name = "-".join(filter(None, (Path(self.model).name, self.other)))
        return KeptImages(self.folder, name, settings, len(self.seeds), len(self.prompts))

    def draw(self, device: str | None, shard: tuple[int, int] = (0, 1)) -> None:
        """Draws what is missing of a shard, on one device. The pipeline is not loaded if nothing is."""
        kept = self.kept()
        if not missing_batches(kept, self.batch, shard):
            return
        pipe = named_models.open_pipeline(self.model, device, compile=self.compile, dtype=self.dtype)
        self._write_facts(kept, pipe)
        title = self.label if shard[1] == 1 else f"{self.label}, part {shard[0] + 1} of {shard[1]}"
        with self.way.around(pipe):
            draw_missing(
                pipe, kept, self.prompts, self.seeds, seeding(self.seeding), batch_size=self.batch, shard=shard,
                progress=title, **self.call,
            )  # fmt: skip

    def facts(self) -> Facts:
        """Size and steps of the pipeline, as they were when it drew."""
        found: Facts = json.loads((self.kept().folder / _FACTS).read_text(encoding="utf-8"))
        return found

    def _write_facts(self, kept: KeptImages, pipe: "DiffusionPipeline") -> None:
        steps = call_arguments(pipe, **self.call).get("num_inference_steps", "default")
        size, bits = named_models.size_at_16_bits(pipe.transformer)
        write_text(kept.folder / _FACTS, json.dumps(Facts(bytes=size, bits=bits, steps=steps)))

    def draw_on(self, devices: Sequence[str | None], shard: tuple[int, int] = (0, 1)) -> None:
        """Draws what is missing of a shard, a part on each device, in a process of its own if there are several.

        Raises:
            RuntimeError: a process failed; what was drawn is kept.
        """
        if len(devices) == 1:
            return self.draw(devices[0], shard)
        if not missing_batches(self.kept(), self.batch, shard):
            return None
        context = multiprocessing.get_context("spawn")
        parts = [(shard[0] + shard[1] * number, shard[1] * len(devices)) for number in range(len(devices))]
        running = [
            context.Process(target=self.draw, args=(device, part)) for device, part in zip(devices, parts, strict=True)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join()
        if any(process.exitcode for process in running):
            raise RuntimeError(
                f"{self.label}: a process that draws has failed, see above; what is drawn is kept, start the same run again"
            )
        return None


def files_of(model: str) -> list[list[object]]:
    """Name, size and time of change of each file in a pipeline's folder: whether it is the same one. None of a hub id."""
    folder = Path(named_models.folder_of(model))
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
