"""The compiled library of CPU kernels: found, opened with ctypes, and asked for its instruction sets.

``csrc/*.c`` is built with the package as a plain shared library: no Python or PyTorch headers, so that one binary goes
with every version of both. It runs on the threads of PyTorch's own OpenMP. Where it was not built (no C compiler), linears
run on PyTorch's operators, with the same results.
"""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

VERSION = 7
"""Version of the library's interface; ``fp4dit_version`` in ``csrc/linear.c`` returns the same number."""
OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types that the library reads and writes, with its number for each."""
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LINEAR: Sequence[type] = [_POINTER] * 7 + [_SIZE] * 5 + [_NUMBER] * 3 + [_POINTER, _NUMBER]
_TOKENS: Sequence[type] = [_POINTER] * 3 + [_SIZE] * 7 + [_NUMBER] * 3 + [ctypes.c_float, _POINTER, _NUMBER]
_SEARCH: Sequence[type] = [_POINTER] * 4 + [_SIZE] * 2 + [_NUMBER] * 2 + [_POINTER, _NUMBER]
_CODEBOOK: Sequence[type] = [_POINTER] * 8 + [_SIZE] * 4 + [_NUMBER] * 3 + [_POINTER, _NUMBER]
_QUANTIZED_CODEBOOK: Sequence[type] = (
    [_POINTER] * 7 + [_SIZE] * 4 + [_NUMBER] * 3 + [ctypes.c_float, _NUMBER, _NUMBER, _POINTER, _NUMBER]
)
_ATTENTION: Sequence[type] = (
    [_POINTER] * 8 + [_SIZE] * 9 + [ctypes.c_float, _NUMBER, _NUMBER, _NUMBER, _POINTER, _NUMBER]
)


@functools.cache
def shared_object() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning, if the package was installed without it."""
    reason = "it was installed without one"
    for path in _candidates():
        try:
            opened = ctypes.CDLL(str(path))
        except OSError as error:
            reason = str(error)
            continue
        if opened.fp4dit_version() != VERSION:
            reason = f"{path} is of another version"
            continue
        opened.fp4dit_linear.argtypes, opened.fp4dit_attention.argtypes = _LINEAR, _ATTENTION
        opened.fp4dit_tokens.argtypes, opened.fp4dit_tokens.restype = _TOKENS, None
        opened.fp4dit_search.argtypes, opened.fp4dit_search.restype = _SEARCH, None
        opened.fp4dit_codebook_linear.argtypes = _CODEBOOK
        opened.fp4dit_quantized_codebook_linear.argtypes = _QUANTIZED_CODEBOOK
        for kernel in (opened.fp4dit_kernel, opened.fp4dit_codebook_kernel, opened.fp4dit_attention_kernel):
            kernel.restype = ctypes.c_char_p
        return opened
    warnings.warn(
        f"fp4dit_ao has no compiled kernel ({reason}): quantized linears on the CPU run on PyTorch operators, "
        "more slowly. Install gcc or clang and reinstall: pip install --force-reinstall --no-deps fp4dit-ao",
        stacklevel=2,
    )
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_built() -> bool:
    """Whether there is a compiled library; ``torch.compile`` asks when it traces, and cannot trace how it is found."""
    return shared_object() is not None


def _candidates() -> Iterator[Path]:
    """Paths of the library: beside this file, then in the installed package, for a checkout that was not built in place.

    The newest first, where a checkout holds several, named with and without a version of Python.
    """
    installed = metadata.distributions(name="fp4dit-ao")
    folders = [Path(__file__).parent, *(Path(str(found.locate_file("fp4dit_ao/kernels/cpu"))) for found in installed)]
    for folder in folders:
        named = {folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
        yield from sorted(filter(Path.exists, named), key=lambda path: path.stat().st_mtime, reverse=True)


def kernels() -> dict[str, int]:
    """Instruction sets that this processor has for ``int8_linear``, best first, with the library's number for each."""
    opened = shared_object()
    return {} if opened is None else instruction_sets(opened.fp4dit_kernel)


def instruction_sets(kernel: Callable[[int], bytes | None]) -> dict[str, int]:
    """Names and numbers from a function of the library, which gives "" for what the processor lacks and NULL at the end."""
    names: list[str] = []
    while (name := kernel(len(names))) is not None:
        names.append(name.decode())
    return {name: number for number, name in enumerate(names) if name}


@functools.cache
def instruction_set() -> str:
    """The best of :func:`kernels`."""
    return next(iter(kernels()))


@functools.cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP that PyTorch loaded; None runs on one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, TypeError, OSError):
        return None


def opened_library(operator: str) -> ctypes.CDLL:
    """The compiled library, for an operator that has no other implementation.

    Raises:
        RuntimeError: the package was installed without it.
    """
    opened = shared_object()
    if opened is None:
        raise RuntimeError(
            f"{operator}: fp4dit_ao was installed without its compiled kernel; install a C compiler and reinstall it"
        )
    return opened
