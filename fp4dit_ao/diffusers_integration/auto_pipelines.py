"""Default call arguments of a pipeline, kept by ``AutoPipelineForImage2Image.from_pipe(pipe)`` and its kin."""

from diffusers.pipelines.auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)

from fp4dit_ao import _compat
from fp4dit_ao.diffusers_integration.call_defaults import with_call_defaults_of

for _auto in (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting):
    _compat.after_from_pipe(_auto, with_call_defaults_of)
