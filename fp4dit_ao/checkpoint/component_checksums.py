"""Checksums of a pipeline's weight files besides the transformer's, which has one for every tensor."""

import hashlib
import json
from pathlib import Path

from fp4dit_ao.checkpoint.tensor_files import read_json

FILE = "checksums.json"
_WEIGHTS = ("*.safetensors", "*.bin")


def write(folder: Path) -> None:
    """Writes the SHA-256 of every weight file of ``folder``'s components, but the transformer's, into ``checksums.json``."""
    files = sorted(path for glob in _WEIGHTS for path in folder.glob(f"*/{glob}") if path.parent.name != "transformer")
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check(folder: Path) -> None:
    """Compares the files in ``folder`` with ``checksums.json``; a folder without it, of an older version, is not checked.

    Raises:
        ValueError: a file is missing or was altered, or the list is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return
    sums = read_json(path)
    if not isinstance(sums, dict) or not all(isinstance(text, str) for text in sums.values()):
        raise ValueError(f"{path} is damaged: it maps no files to checksums; copy it again")
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; copy the whole folder again")
        if _sha256(file) != expected:
            raise ValueError(
                f"{file} was altered since it was saved: its SHA-256 differs; copy it again, or delete {FILE} if the change "
                "is wanted"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
