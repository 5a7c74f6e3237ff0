"""A diffusers pipeline as what an engine draws with."""

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.serving.engine import Image, Style

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Painter:
    """Draws batches with a pipeline. Every image has a generator of its own, so its noise does not depend on its neighbours.

    Args:
        pipe: a text-to-image pipeline; its ``generation.json`` says what a request does not.
        max_batch: images of a batch, at most.
        same_bits: draw every batch as one of ``max_batch``, filled up with copies of its last image. An image's bits then do
            not depend on how many it was drawn with: matrix libraries choose other kernels, and other orders of summation,
            for other numbers of rows. Fewer images then take as long as ``max_batch``.

    Attributes:
        default: the style of a request that asks for none.
        multiple: of which width and height must be multiples.

    Raises:
        ValueError: not a text-to-image pipeline.
    """

    def __init__(self, pipe: "DiffusionPipeline", max_batch: int = 1, same_bits: bool = False):
        self._pipe, self._max_batch, self._same_bits = pipe, max_batch, same_bits
        parameters = inspect.signature(type(pipe).__call__).parameters
        needed = {"prompt", "height", "width", "num_inference_steps", "generator", "output_type"}
        if missing := sorted(needed - set(parameters)):
            raise ValueError(f"{type(pipe).__name__} cannot be served: its call takes no {', '.join(missing)}")
        self._arguments = call_arguments(pipe, output_type="np")
        steps = self._arguments.pop("num_inference_steps", parameters["num_inference_steps"].default)
        scale = int(getattr(pipe, "vae_scale_factor", 8))
        config = pipe.transformer.config
        side = int(config.get("sample_size") or 64) * scale
        width, height = self._arguments.pop("width", side), self._arguments.pop("height", side)
        self.default = Style(int(width), int(height), int(steps))
        patch = config.get("patch_size")
        self.multiple = math.lcm(8, scale * (patch if isinstance(patch, int) else 2))

    def warm_up(self) -> None:
        """Draw batches of one, two and as many as there may be, at the default size, with two steps: all that is compiled."""
        style = Style(self.default.width, self.default.height, min(2, self.default.steps))
        counts = {self._max_batch} if self._same_bits else {1, min(2, self._max_batch), self._max_batch}
        for count in sorted(counts):
            self.draw(style, ["warm up"] * count, [0] * count)

    @torch.no_grad()
    def draw(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One uint8 image ``(height, width, 3)`` per prompt.

        Raises:
            RuntimeError: the model gave numbers that are no image.
        """
        count = len(prompts)
        if self._same_bits:
            missing = self._max_batch - count
            prompts, seeds = [*prompts, *[prompts[-1]] * missing], [*seeds, *[seeds[-1]] * missing]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = {"width": style.width, "height": style.height, "num_inference_steps": style.steps}
        output = self._pipe(list(prompts), generator=generators, **(self._arguments | size)).images
        images = np.asarray(output, dtype=np.float32)[:count]
        if not np.isfinite(images).all():
            raise RuntimeError("the model's output holds NaN or infinity")
        return list((images * 255).round().clip(0, 255).astype(np.uint8))
