"""The compiled library of CPU kernels, and the operator around that for 4-bit weights.

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
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.ops import LIBRARY

VERSION = 6
"""Of the library's interface; ``fp4dit_version`` in ``csrc/linear.c`` says the same."""
OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LINEAR: list[Any] = [_POINTER] * 7 + [_SIZE] * 5 + [_NUMBER] * 3 + [_POINTER, _NUMBER]
_TOKENS: list[Any] = [_POINTER] * 3 + [_SIZE] * 7 + [_NUMBER] * 3 + [ctypes.c_float, _POINTER, _NUMBER]
_SEARCH: list[Any] = [_POINTER] * 4 + [_SIZE] * 2 + [_NUMBER] * 2 + [_POINTER, _NUMBER]
_CODEBOOK: list[Any] = [_POINTER] * 8 + [_SIZE] * 4 + [_NUMBER] * 3 + [_POINTER, _NUMBER]
_QUANTIZED_CODEBOOK: list[Any] = (
    [_POINTER] * 7 + [_SIZE] * 4 + [_NUMBER] * 3 + [ctypes.c_float, _NUMBER, _NUMBER, _POINTER, _NUMBER]
)
_ATTENTION: list[Any] = [_POINTER] * 8 + [_SIZE] * 9 + [ctypes.c_float, _NUMBER, _NUMBER, _POINTER, _NUMBER]


@functools.cache
def shared_object() -> ctypes.CDLL | None:
    """The compiled library; None if the package was installed without it, which is said once."""
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
        opened.fp4dit_kernel.restype = opened.fp4dit_codebook_kernel.restype = ctypes.c_char_p
        return opened
    warnings.warn(
        f"fp4dit_ao has no compiled kernel ({reason}): quantized linears on the CPU run on PyTorch operators, "
        "more slowly. Install gcc or clang and reinstall: pip install --force-reinstall --no-deps fp4dit-ao",
        stacklevel=2,
    )
    return None


def _candidates() -> Iterator[Path]:
    """Beside this file; and where the package is installed, if this file is in a checkout that was not built in place."""
    installed = metadata.distributions(name="fp4dit-ao")
    folders = [Path(__file__).parent, *(Path(str(found.locate_file("fp4dit_ao/kernels"))) for found in installed)]
    for folder in folders:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (path := folder / f"_native{suffix}").exists():
                yield path


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
def _best() -> int:
    return next(iter(kernels().values()))


@functools.cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP that PyTorch loaded; None runs on one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, TypeError, OSError):
        return None


def supports(x: Tensor, bits: int, group: int) -> bool:
    """Whether ``int8_linear`` can take ``x``: on the CPU, with weights of at most ``bits=4`` and groups of whole dwords."""
    return x.device.type == "cpu" and bits <= 4 and group % 4 == 0 and shared_object() is not None


@functools.cache
def levels(fmt: NumberFormat) -> list[int]:
    """What the codes of a format of at most 4 bits stand for."""
    return [fmt.level(code) for code in range(2**fmt.bits)] + [0] * (16 - 2**fmt.bits)


@functools.cache
def _entries(table: tuple[int, ...]) -> Any:
    """The table for the library; None if it is none."""
    fits = len(table) == 16 and all(abs(level) <= 127 for level in table)
    return (ctypes.c_int8 * 16)(*table) if fits else None


def run(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    table: Sequence[int],
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
    kernel: str | None = None,
) -> Tensor:
    """``(tokens @ levels^T, group by group times scale) * token_scale + bias``: ``torch.ops.fp4dit_ao.int8_linear`` on CPUs.

    Products are exact, sums of groups float32.

    Args:
        tokens: int8 ``(digits * rows, in_features)``, -127 to 127; the highest digit of all rows first.
        token_scale: float32 ``(rows, 1)``.
        qdata: uint8 ``(out_features, in_features / 2)``, two codes a byte, the first in the low nibble.
        scale: float ``(out_features or 1, groups)``.
        table: sixteen levels, -127 to 127: what each code stands for.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
        digits: 1 to 3, to the base 128, of each level of the tokens.
        kernel: one of :func:`kernels`; None takes the best. The operator has no such argument.

    Returns:
        ``(rows, out_features)`` of ``output_dtype``.

    Raises:
        ValueError: shapes or the table do not fit; nothing is read out of bounds.
        RuntimeError: no library, an instruction set that the processor lacks, or no memory.
    """
    opened = shared_object()
    if opened is None:
        raise RuntimeError("fp4dit_ao was installed without its compiled kernel; install a C compiler and reinstall it")
    rows, depth = tokens.shape[0] // max(1, digits), tokens.shape[1]
    features, groups = qdata.shape[0], scale.shape[1]
    group = depth // max(1, groups)
    fits = (
        qdata.shape[1] * 2 == depth and group * groups == depth and group % 4 == 0 and scale.shape[0] in (1, features)
    )
    fits = fits and 1 <= digits <= 3 and tokens.shape[0] == digits * rows
    fits = fits and token_scale.numel() == rows and (bias is None or bias.shape == (features,))
    fits = fits and tokens.dtype == torch.int8 and qdata.dtype == torch.uint8 and output_dtype in OUTPUTS
    entries = _entries(tuple(table))
    if not fits or entries is None:
        raise ValueError(
            f"int8_linear: tokens {tuple(tokens.shape)} {tokens.dtype} of {digits} digits, codes {tuple(qdata.shape)} "
            f"{qdata.dtype}, scales {tuple(scale.shape)}, {len(table)} levels to {output_dtype} do not fit; in_features must "
            "be the groups' number times a multiple of 4, and levels within +-127"
        )
    arrays = [tokens.contiguous(), token_scale.float().contiguous(), qdata.contiguous(), scale.float().contiguous()]
    added = None if bias is None else bias.float().contiguous()
    out = torch.empty((rows, features), dtype=output_dtype)
    number = _best() if kernel is None else kernels()[kernel]
    failed = opened.fp4dit_linear(
        *(array.data_ptr() for array in arrays), entries, None if added is None else added.data_ptr(),
        out.data_ptr(), rows, features, depth, group, scale.shape[0], digits, OUTPUTS[output_dtype], number, parallel(),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"int8_linear: {('out of memory', 'instruction set not available')[failed - 1]}")
    return out


LIBRARY.define(
    "int8_linear(Tensor tokens, Tensor token_scale, Tensor qdata, Tensor scale, int[] table, Tensor? bias, "
    "ScalarType output_dtype, int digits=1) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # else Inductor copies what several linears share
)
LIBRARY.impl("int8_linear", run, "CPU")
LIBRARY.impl(
    "int8_linear",
    lambda tokens, token_scale, qdata, scale, table, bias, output_dtype, digits=1: tokens.new_empty(
        (token_scale.shape[0], qdata.shape[0]), dtype=output_dtype
    ),
    "Meta",
)
