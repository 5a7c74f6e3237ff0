"""What several test files need and is slow to make."""

from typing import Any

import pytest

from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="session")
def tiny_quantized() -> Any:
    """The tiny pipeline with one block, W4A6, rounded to nearest; not to be changed."""
    from fp4dit_ao import quantize_pipeline

    how = {"prompts": ["a red cat", "a blue dog"], "rounding": "nearest", "progress": False}
    pipe = quantize_pipeline(tiny_pipeline(layers=1), "w4a6", **how, **CALL)
    pipe.generation_defaults = dict(CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe
