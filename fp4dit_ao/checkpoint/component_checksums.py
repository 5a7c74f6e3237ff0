"""Checksums of a pipeline's weight files besides the transformer's, which has one for every tensor."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fp4dit_ao.checkpoint.tensor_files import read_json

FILE = "checksums.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_CHUNK = 16 << 20
"""Bytes that are read at once."""


def write(folder: Path) -> None:
    """Writes the SHA-256 of every weight file of ``folder``'s components, but the transformer's, into ``checksums.json``."""
    files = sorted(path for glob in _WEIGHTS for path in folder.glob(f"*/{glob}") if path.parent.name != "transformer")
    sums = {path.relative_to(folder).as_posix(): digest for path, digest in _digests(files).items()}
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
    missing = next((name for name in sums if not (folder / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"{folder / missing} is missing; copy the whole folder again")
    found = _digests([folder / name for name in sums])
    altered = next((name for name, expected in sums.items() if found[folder / name] != expected), None)
    if altered is not None:
        raise ValueError(
            f"{folder / altered} was altered since it was saved: its SHA-256 differs; copy it again, or delete {FILE} if the "
            "change is wanted"
        )


def _digests(files: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of each file; a progress bar shows if that takes more than two seconds, as for a large text encoder."""
    total = sum(file.stat().st_size for file in files)
    found: dict[Path, str] = {}
    with tqdm(total=total, desc="checksums", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            found[file] = digest.hexdigest()
    return found
