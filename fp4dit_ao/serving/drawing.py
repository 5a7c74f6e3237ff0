""":class:`Painter`: draws the batches of an engine with a diffusers pipeline."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image as Pillow

from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.serving import editing
from fp4dit_ao.serving.engine_types import Image, Look, Style

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Painter:
    """Draws batches with a pipeline. Every image has its own generator, so its noise does not depend on its batch.

    Args:
        pipe: a text-to-image pipeline; its ``generation.json`` gives the arguments that requests do not.
        max_batch: most images of a batch.
        same_bits: pad every batch to ``max_batch`` with copies of its last image. The bits of an image then do not
            depend on the size of its batch, for which matrix libraries choose kernels with other orders of summation.
            Smaller batches then take as long as full ones.

    Attributes:
        default: style of requests that do not give one.
        multiple: width and height must be multiples of this.
        between_steps: called after every denoising step of a pipeline that takes a callback, with the number of finished steps
            and a function that shows the images; what it raises ends the batch.
        previews: whether images can be shown while they are drawn.
        edits: pipelines that start from an image, by what they take; see :func:`fp4dit_ao.serving.editing.derived`.

    Raises:
        ValueError: ``pipe`` is not a text-to-image pipeline.
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

        self.between_steps: Callable[[int, Look | None], None] = lambda done, look: None
        callback = self._callback(parameters)
        self._arguments |= callback
        self._drawn = self.default
        autoencoder = getattr(getattr(pipe, "vae", None), "config", {})
        latents_are_images = autoencoder.get("latent_channels", 0) == config.get("in_channels")  # FLUX.1 packs patches
        self.previews = bool(callback) and latents_are_images and hasattr(pipe, "image_processor")
        self.edits = editing.derived(pipe)

    def _callback(self, parameters: Mapping[str, inspect.Parameter]) -> dict[str, object]:
        """Arguments by which the pipeline calls ``between_steps``: newer pipelines take another one than older ones."""

        def at_end(pipe: object, step: int, timestep: object, values: dict[str, object]) -> dict[str, object]:
            latents = values.get("latents")
            self._step_ended(step, timestep, latents if isinstance(latents, torch.Tensor) else None)
            return values

        if "callback_on_step_end" in parameters:
            return {"callback_on_step_end": at_end}
        return {"callback": self._step_ended, "callback_steps": 1} if "callback" in parameters else {}

    def _step_ended(self, step: int, timestep: object, latents: torch.Tensor | None) -> None:
        def look(places: Sequence[int]) -> list[Image]:
            assert latents is not None
            return self._decoded(latents[list(places)])

        self.between_steps(step + 1, look if self.previews and latents is not None else None)

    def _decoded(self, latents: torch.Tensor) -> list[Image]:
        """What the autoencoder makes of ``latents`` ``(n, channels, height, width)``, in the size that is drawn."""
        autoencoder = self._pipe.vae
        shift = autoencoder.config.get("shift_factor") or 0.0
        scaled = latents.to(autoencoder.dtype) / autoencoder.config["scaling_factor"] + shift
        decoded = autoencoder.decode(scaled, return_dict=False)[0]
        shown = _bytes(self._pipe.image_processor.postprocess(decoded, output_type="np"))
        size = self._drawn.width, self._drawn.height  # pipelines that bin resolutions draw in another one
        return [x if x.shape[1::-1] == size else np.asarray(Pillow.fromarray(x).resize(size)) for x in shown]

    def warm_up(self) -> None:
        """Draws batches of one, two and ``max_batch`` images at the default size with two steps, which compiles all
        variants."""
        style = Style(self.default.width, self.default.height, min(2, self.default.steps))
        counts = {self._max_batch} if self._same_bits else {1, min(2, self._max_batch), self._max_batch}
        for count in sorted(counts):
            self.draw(style, ["warm up"] * count, [0] * count)

    @torch.no_grad()
    def draw(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Draws one image per prompt: uint8 ``(height, width, 3)``.

        Raises:
            RuntimeError: the output holds NaN or infinity.
        """
        count = len(prompts)
        if self._same_bits:
            missing = self._max_batch - count
            prompts, seeds = [*prompts, *[prompts[-1]] * missing], [*seeds, *[seeds[-1]] * missing]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = {"width": style.width, "height": style.height, "num_inference_steps": style.steps}
        pipe, arguments = self._pipe, self._arguments | size
        if style.edit is not None:
            pipe, arguments = editing.arguments(self.edits, style.edit, arguments, len(prompts))
        self._drawn = style
        output = pipe(list(prompts), generator=generators, **arguments).images
        images = np.asarray(output, dtype=np.float32)[:count]
        if not np.isfinite(images).all():
            raise RuntimeError("the model's output holds NaN or infinity")
        return _bytes(images)


def _bytes(images: ArrayLike) -> list[Image]:
    """Images of values from 0 to 1 as uint8."""
    return list((np.asarray(images, dtype=np.float32) * 255).round().clip(0, 255).astype(np.uint8))
