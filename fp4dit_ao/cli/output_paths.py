"""Early checks of output paths, before minutes of work."""

import os
from pathlib import Path


def check_writable_folder(folder: Path) -> None:
    """Raises ``OSError`` if ``folder`` cannot be made or written into; nothing is created."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}: no permission to write into {existing}; name another folder")


def check_writable_file(path: Path) -> None:
    """Raises ``OSError`` if ``path`` is a folder, or cannot be written; nothing is created."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    check_writable_folder(path.absolute().parent)
