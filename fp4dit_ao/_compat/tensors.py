"""Tensors and modules: subclasses, fake tensors, versions, low-bit products, parameter slots."""

import contextlib
from collections.abc import Callable, Container, Iterable, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes, return_and_correct_aliasing

from fp4dit_ao._compat.operator_calls import Arguments, Keywords, Operator

Subclass = TypeVar("Subclass", bound=Tensor)
Result = TypeVar("Result")


TensorMeta: Any = type(Tensor)
"""Metaclass of tensors and of their subclasses."""


def wrapper_tensor(
    cls: type[Subclass], shape: Sequence[int], dtype: torch.dtype, device: torch.device, requires_grad: bool = False
) -> Subclass:
    """Makes an instance of the tensor subclass ``cls`` that has no memory of its own.

    It reports ``shape``, ``dtype`` and ``device``; ``cls.__init__`` adds the tensors that hold the data.
    """
    made: Subclass = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
    )
    return made


def aliased(func: Operator, args: Arguments, kwargs: Keywords, result: Result) -> Result:
    """``result`` of a subclass's own ``func``, sharing storage with ``args`` where the operator's schema says so."""
    shared: Result = return_and_correct_aliasing(func, args, kwargs, result)
    return shared


def int8_product(x: Tensor, y: Tensor) -> Tensor:
    """int32 ``x @ y`` of int8 matrices. On CUDA, ``x`` needs more than 16 rows, and sizes are multiples of eight."""
    return torch._int_mm(x, y)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has products in bfloat16 (AVX-512 BF16, AMX, Arm's bf16), or else they are slower than float32's."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_multiplies_int8() -> bool:
    """Whether :func:`int8_product` has int8 instructions on this CPU; without them it is a plain loop."""
    return bool(torch.cpu._is_vnni_supported())


def fp8_product(
    x: Tensor,
    y: Tensor,
    x_scale: Tensor,
    y_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """``(x @ y) * x_scale * y_scale + bias`` of float8 matrices, on GPUs of capability 8.9 and up, and on CPUs.

    Args:
        x: float8_e4m3fn ``(rows, depth)``, row-major.
        y: float8_e4m3fn ``(depth, columns)``, column-major; both sizes are multiples of 16.
        x_scale: float32 ``(rows, 1)``.
        y_scale: float32 ``(1, columns)``.
        dtype: of the result; row-wise scales allow bfloat16 alone.
        bias: ``(columns,)`` of ``dtype`` or None.
        fast: whether sums may have fewer bits on Hopper, which is faster.
    """
    if x.device.type == "cpu" and torch.__version__ < "2.12":  # whose CPUs know one scale for all rows
        result = x.float() @ y.float() * x_scale * y_scale
        return (result if bias is None else result + bias.float()).to(dtype)
    return torch._scaled_mm(x, y, x_scale, y_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def version(x: Tensor) -> int:
    """Counts the in-place changes of ``x``; a result computed from ``x`` is out of date once it differs."""
    return x._version


def is_view_of_another(x: Tensor) -> bool:
    """Whether autograd knows ``x`` as a view of another tensor."""
    return x._is_view()


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """``target += weight * (source - target)`` for every pair, in place and in few kernels."""
    torch._foreach_lerp_(list(targets), list(sources), weight)


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """``linear(x, weight, bias)`` on oneDNN with the weight laid out for that many rows beforehand, as Inductor does it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def prepacked_int8_linear(tokens: Tensor, levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``(tokens @ levels^T) * scale`` on oneDNN, with the weight laid out for that many rows beforehand.

    Args:
        tokens: int8 ``(rows, in_features)``; oneDNN knows one scale for all of them, which is 1 here.
        levels: int8 ``(out_features, in_features)``.
        scale: float32 ``(out_features,)``.
        dtype: of the result, float32 or bfloat16.
    """
    packed = torch.ops.onednn.qlinear_prepack(levels, list(tokens.shape))
    zeros = torch.zeros(levels.shape[0], dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        tokens, 1.0, 0, packed, scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer is part of its module's state dict."""
    return buffer not in module._non_persistent_buffers_set


def fake_mode() -> FakeTensorMode:
    """A mode in which operators compute shapes and types but no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a value in a graph that ``torch.compile`` is making: all that changes it is in the graph."""
    return isinstance(x, FunctionalTensor)


def size_hint(size: int | torch.SymInt) -> int | None:
    """A size while a graph is made: a dynamic one has the example's, or None where there is no example."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint if isinstance(hint, int) else None


def without_modes() -> contextlib.AbstractContextManager[object]:
    """A context in which tensors are real and operators run, even while a graph is traced."""
    modes: contextlib.AbstractContextManager[object] = _disable_current_modes()
    return modes


def fake_like(x: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    """A tensor of ``x``'s shape that claims to be on the CPU and holds nothing."""
    return FakeTensor(mode, torch.empty_like(x, device="meta", dtype=dtype), torch.device("cpu"))


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the type in the arguments of ``Module.to``."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


def slots(module: nn.Module) -> tuple[MutableMapping[str, Tensor | None], MutableMapping[str, Tensor | None]]:
    """The module's own parameters and buffers by name, as the dictionaries that hold them: assigning replaces one.

    ``setattr`` refuses what is not exactly a ``Parameter``, and ``register_parameter`` moves a name to the end.
    """
    return module._parameters, module._buffers  # type: ignore[return-value]


def make_buffers_persistent(model: nn.Module, names: Container[str]) -> list[tuple[nn.Module, set[str]]]:
    """Bring the buffers of ``model`` that are among ``names`` into its state dict; returns those that were not, by module."""
    found = []
    for prefix, module in model.named_modules():
        own = {leaf for leaf in module._non_persistent_buffers_set if (f"{prefix}.{leaf}" if prefix else leaf) in names}
        module._non_persistent_buffers_set -= own
        found.append((module, own))
    return found


def make_buffers_transient(buffers: list[tuple[nn.Module, set[str]]]) -> None:
    """Undo :func:`make_buffers_persistent`."""
    for module, names in buffers:
        module._non_persistent_buffers_set |= names


def leave_in_data_parallel(model: nn.Module, names: Iterable[str]) -> None:
    """Let ``DistributedDataParallel(model)``, when it is made, leave the parameters of these names alone."""
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
