"""Prompt files: texts, or what text encoders made of them."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_prompts(path: str | Path) -> list[str]:
    """Reads prompts from a UTF-8 text file, one per line; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``path`` is a folder, not UTF-8, or holds only blank lines.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no prompt file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def read_encoded_prompts(path: str | Path) -> dict[str, Tensor]:
    """Reads encoded prompts from a safetensors file: tensors by the names of a pipeline's arguments (``prompt_embeds``, …).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or has no ``prompt_embeds``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of encoded prompts {path}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file ({error}); write it with safetensors.torch.save_file"
        ) from error
    if "prompt_embeds" not in tensors:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise ValueError(
            f"{path} holds {found}; it must hold prompt_embeds, and what else the pipeline's call takes beside it"
        )
    return tensors
