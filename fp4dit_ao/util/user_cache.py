"""Small results that are kept between processes, in the user's cache folder: what is lost is measured again."""

import json
import os
import sys
import warnings
from pathlib import Path

from fp4dit_ao.util.atomic_files import write_text

VARIABLE = "FP4DIT_AO_CACHE"
"""Environment variable that names another folder."""


def cache_folder() -> Path:
    """This package's folder among the user's caches, where the platform keeps them; it need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = Path.home()
    places = {
        "darwin": home / "Library" / "Caches",
        "win32": Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"),
    }
    return places.get(sys.platform, Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")) / "fp4dit-ao"


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in ``path``; an empty one if the file is missing, damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: dict[str, object]) -> None:
    """Writes ``value`` to ``path``; warns if it cannot, since nothing depends on it."""
    try:
        write_text(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"results are not kept for the next time: {error}; name a folder in {VARIABLE}", stacklevel=2)
