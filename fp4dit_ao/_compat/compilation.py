"""``torch.compile``, ``torch.export`` and AOTInductor: switches, and repairs of older versions."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode

from fp4dit_ao._compat.operator_calls import Arguments, Keywords, Operator


def distinct_sizes() -> contextlib.AbstractContextManager[None]:
    """While compiling, sizes that happen to be equal (height and width, batch and heads) are not taken to always be so."""
    config: ModuleType = symbolic_config
    patch: contextlib.AbstractContextManager[None] = config.patch(use_duck_shape=False)
    return patch


def compiler_options() -> dict[str, str | int | bool | Callable[..., object]] | None:
    """Inductor's options for graphs of dynamic sizes. Older versions analyse how their kernels read memory by comparing sizes
    as text, and stop at two that are equal but written differently."""
    return None if torch.__version__ >= "2.13" else {"triton.coalesce_tiling_analysis": False}


def sizes_of_repeats() -> contextlib.AbstractContextManager[object]:
    """While exporting, ``repeat_interleave`` keeps sizes symbolic; torch 2.11's takes the one it repeats for a constant."""
    return contextlib.nullcontext() if torch.__version__ >= "2.12" else _ExpandedRepeats()


class _ExpandedRepeats(TorchFunctionMode):
    """``repeat_interleave`` by a whole number is recorded as the operators that it stands for."""

    def __torch_function__(
        self, func: Operator, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            x, repeats, dim = self._arguments(*args, **(kwargs or {}))
            if isinstance(repeats, int):
                return self._expanded(x, repeats, dim)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _arguments(
        input: Tensor, repeats: int | Tensor, dim: int | None = None, *, output_size: object = None
    ) -> tuple[Tensor, int | Tensor, int | None]:
        return input, repeats, dim

    @staticmethod
    def _expanded(x: Tensor, repeats: int, dim: int | None) -> Tensor:
        x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
        shape = [*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]]
        return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


_CPP_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
"""C++'s numbers of the types that our operators take as arguments (``c10::ScalarType``)."""
_FP8_HEADER = "#include <c10/util/Float8_e4m3fn.h>"


@contextlib.contextmanager
def types_in_packages() -> Iterator[None]:
    """While compiling a package: what older compilers write of types is what they then read.

    torch 2.11 writes type arguments in the numbers of export, and reads them as C++'s; it and 2.12 use FP8 without including
    its header.
    """
    with contextlib.ExitStack() as changes:
        if torch.__version__ < "2.12":
            changes.enter_context(_numbers_of_cpp())
        if torch.__version__ < "2.13":
            changes.enter_context(_header_of_fp8())
        yield


@contextlib.contextmanager
def _numbers_of_cpp() -> Iterator[None]:
    from torch._export.serde import serialize

    module: ModuleType = serialize
    numbers: dict[torch.dtype, int] = module._TORCH_TO_SERIALIZE_DTYPE
    own = dict(numbers)
    numbers.update(_CPP_TYPES)
    try:
        yield
    finally:
        numbers.update(own)


@contextlib.contextmanager
def _header_of_fp8() -> Iterator[None]:
    from torch._inductor.codegen import cpp_wrapper_cpu

    module: ModuleType = cpp_wrapper_cpu
    wrapper = module.CppWrapperCpu
    include = wrapper.get_device_include_path
    wrapper.get_device_include_path = staticmethod(lambda device: f"{include(device)}\n{_FP8_HEADER}")
    try:
        yield
    finally:
        wrapper.get_device_include_path = staticmethod(include)


def mark_static(x: Tensor) -> None:
    """Let ``torch.compile`` take the sizes of ``x`` (and of the tensors that a subclass is made of) for constants."""
    torch._dynamo.mark_static(x)


def compile_package(exported: ExportedProgram, path: str | Path, options: Mapping[str, object]) -> None:
    """Compile ``exported`` ahead of time with AOTInductor and write the package to ``path``.

    Args:
        exported: the program.
        path: ends in ``.pt2``.
        options: of Inductor.
    """
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(options))


class Package(Protocol):
    """A compiled package, to be called as the program was."""

    def __call__(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]: ...

    def get_metadata(self) -> dict[str, str]:
        """Returns the texts that were stored in its options, by name."""


def load_package(path: str | Path) -> Package:
    """The compiled package in the file ``path``."""
    package: Package = torch._inductor.aoti_load_package(str(path))
    return package


def is_compiled_copy(model: nn.Module) -> bool:
    """Whether ``model`` is what ``torch.compile(module)`` returned: another module, around the first."""
    return hasattr(model, "_orig_mod")
