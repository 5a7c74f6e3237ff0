"""What all tests share: what several of them need and is slow to make, and caches of compiled code."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch.compiler.config

from tests.tiny import CALL, tiny_pipeline

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchao", "diffusers", "transformers", "triton", "numpy")


def _sources() -> str:
    """A digest of every source file: torch's caches know our operators by name, not by what they trace to."""
    digest = hashlib.sha256()
    for folder in ("fp4dit_ao", "passes", "observers"):
        for path in sorted(file for suffix in ("*.py", "*.c", "*.h") for file in (ROOT / folder).rglob(suffix)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


torch.compiler.config.cache_key_tag = _sources()  # what a run compiled serves the next one only if nothing changed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tests ran on, above the line that counts them: a row of docs/versions.md."""
    installed = {found.name: found.version for found in metadata.distributions() if found.name in PACKAGES}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    terminalreporter.write_line(f"Python {platform.python_version()}, {versions}")


@pytest.fixture(scope="session")
def tiny_quantized() -> Any:
    """The tiny pipeline with one block, W4A6, rounded to nearest; not to be changed."""
    from fp4dit_ao import quantize_pipeline

    how = {"prompts": ["a red cat", "a blue dog"], "rounding": "nearest", "progress": False}
    pipe = quantize_pipeline(tiny_pipeline(layers=1), "w4a6", **how, **CALL)
    pipe.generation_defaults = dict(CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe
