"""Calibration: collecting samples from a pipeline, and running them through observers."""

from fp4dit_ao.calibration.collection import MEMORY_LIMIT, collect_samples, size_in_bytes
from fp4dit_ao.calibration.observation import calibrate, check_finite
from fp4dit_ao.calibration.prompts import read_encoded_prompts, read_prompts
from fp4dit_ao.calibration.sample_selection import SELECTIONS, SampleSelection

__all__ = [
    "MEMORY_LIMIT",
    "SELECTIONS",
    "SampleSelection",
    "calibrate",
    "check_finite",
    "collect_samples",
    "read_encoded_prompts",
    "read_prompts",
    "size_in_bytes",
]
