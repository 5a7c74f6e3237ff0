"""Prompt files."""

from pathlib import Path


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
