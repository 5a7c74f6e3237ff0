"""``torch.compile`` where it is a command's default and the machine may lack a compiler or Python's header."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

_PLATFORM_COMPILERS = {"darwin": ("clang++",), "win32": ("cl",)}


def missing_for_compilation() -> str | None:
    """What Inductor needs for code on CPUs and this machine lacks, with the remedy; None if it lacks nothing.

    It calls ``$CXX``, or g++ (clang++ on macOS, cl on Windows), and its code includes ``Python.h``, which Debian and Fedora
    have in a package of its own.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _PLATFORM_COMPILERS.get(sys.platform, ("g++",))
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler ({' or '.join(names)}): install one, or name it in CXX"
    include = Path(sysconfig.get_path("include"))
    if sys.platform != "darwin" and not (include / "Python.h").exists():  # frameworks of macOS have it elsewhere
        return f"no Python.h in {include}: install python3-dev or python3-devel"
    return None


def compile_if_possible(wanted: bool, device: str) -> bool:
    """``wanted``; or, on a CPU where something that compiling takes is missing, False, after a line that says what."""
    missing = missing_for_compilation() if wanted and device == "cpu" else None
    if missing:
        print(
            f"torch.compile cannot run here, so the quantized pipeline runs without it. There is {missing}", flush=True
        )
    return wanted and missing is None
