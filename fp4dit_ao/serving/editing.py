"""Pipelines that start from an image, made from a text-to-image pipeline by diffusers' AutoPipeline classes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image as Pillow

from fp4dit_ao.calibration.pipeline_arguments import CallArguments, accepted
from fp4dit_ao.serving.engine_types import Edit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def derived(pipe: "DiffusionPipeline") -> "dict[str, DiffusionPipeline]":
    """Pipelines that share all components with ``pipe``: ``"image"`` takes an image, ``"mask"`` a mask, too.

    Those that diffusers does not have for this pipeline are missing.
    """
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    found = {}
    for name, auto in (("image", AutoPipelineForImage2Image), ("mask", AutoPipelineForInpainting)):
        try:
            found[name] = auto.from_pipe(pipe)
        except ValueError:  # it knows none, or the one that it knows needs further components
            continue
        found[name].set_progress_bar_config(disable=True)
    return found


def arguments(
    pipelines: "Mapping[str, DiffusionPipeline]", edit: Edit, call: Mapping[str, object], count: int
) -> "tuple[DiffusionPipeline, CallArguments]":
    """The pipeline for an edit, and the arguments of its call.

    Args:
        pipelines: result of :func:`derived`.
        edit: the edit.
        call: arguments of the text-to-image pipeline; those that the other does not take are left out.
        count: number of images.
    """
    pipe = pipelines["image" if edit.mask is None else "mask"]
    images = {"image": [Pillow.fromarray(edit.image)] * count, "strength": edit.strength}
    if edit.mask is not None:
        images["mask_image"] = [Pillow.fromarray(edit.mask)] * count
    return pipe, accepted(pipe, call) | images
