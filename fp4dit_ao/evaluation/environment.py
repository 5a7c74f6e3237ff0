"""Hardware and software versions of a measurement, written beside every figure."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.util.versions import version_of

_PACKAGES = ("fp4dit-ao", "torch", "torchao", "diffusers", "transformers")


def environment() -> dict[str, str]:
    """Processor, threads, GPU (``"none"`` if there is none), Python and package versions of this machine."""
    found = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernel": next(iter(native.kernels()), "none"),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return found | versions()


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed, by name; ``"absent"`` if one is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def processor() -> str:
    """Marketing name of the processor, or what the system reports instead."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def one_line() -> str:
    """This machine's environment as one sentence, for under a table."""
    return describe(environment())


def describe(e: dict[str, str]) -> str:
    """Formats a result of :func:`environment`, of any machine, as one sentence."""
    device = e["processor"] + (f", {e['gpu']}" if e["gpu"] != "none" else "")
    return f"{device}; {e['threads']} threads; torch {e['torch']}, torchao {e['torchao']}, diffusers {e['diffusers']}."


def _version(name: str) -> str:
    try:
        return version_of(name)
    except metadata.PackageNotFoundError:
        return "absent"
