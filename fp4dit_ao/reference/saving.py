"""Writing a trained pipeline in half the bytes, as a folder that ``from_pretrained`` reads in float32."""

import json
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline


def save_pipeline(pipe: PixArtSigmaPipeline, dtype: torch.dtype, call: dict[str, object], out: Path) -> None:
    """Writes ``pipe`` in ``dtype`` to the folder ``out``, and ``call`` beside it as ``generation.json``; ``pipe`` is
    converted."""
    pipe.to(dtype=dtype).save_pretrained(out, safe_serialization=True)
    config = out / "text_encoder" / "config.json"  # transformers, unlike diffusers, would otherwise load it as stored
    stored = str(dtype).removeprefix("torch.")
    config.write_text(config.read_text(encoding="utf-8").replace(f'"{stored}"', '"float32"'), encoding="utf-8")
    (out / "generation.json").write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
