"""The composition pipeline: a small PixArt-Sigma that draws several emoji where a prompt says, on a colour.

Unlike the first reference pipeline it has not seen the prompts that it is judged by: one in ten combinations of two
emoji, and of an emoji and a colour, appears in no training picture. Importing this module loads neither torch nor
diffusers. The pipeline is not in the package; see ``README.md`` beside this file for how to make it.
"""

import json
from pathlib import Path


def path() -> Path:
    """Folder of the pipeline, in diffusers' own layout.

    Raises:
        FileNotFoundError: it was not made yet.
    """
    folder = Path(__file__).parent
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"there is no composition pipeline in {folder}; make one: python -m fp4dit_ao.reference.compositions.train, "
            "then python -m fp4dit_ao.reference.compositions.pack"
        )
    return folder


def generation() -> dict[str, object]:
    """Default keyword arguments of the pipeline: steps, guidance, size, text length."""
    call: dict[str, object] = json.loads((Path(__file__).parent / "generation.json").read_text(encoding="utf-8"))
    return call
