"""torchao's prototypes: block formats, INT4 on CPUs. Imported where they are needed, since torchao takes seconds to import."""

import logging
from typing import TYPE_CHECKING

# torch warns on its log of an enumeration that torchao registers, which nobody who reads it can change
_LOG = logging.getLogger("torch.utils._pytree")


def _unexpected(record: logging.LogRecord) -> bool:
    return "is an Enum subclass" not in record.getMessage()


_LOG.addFilter(_unexpected)
try:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
finally:
    _LOG.removeFilter(_unexpected)

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

__all__ = [
    "DTYPE_FP6_E2M3",
    "DTYPE_FP6_E3M2",
    "MXTensor",
    "NVFP4Tensor",
    "QuantizeTensorToMXKwargs",
    "QuantizeTensorToNVFP4Kwargs",
    "ScaleCalculationMode",
    "int4_cpu_config",
    "int8_int4_config",
]


def int4_cpu_config(group_size: int) -> "AOBaseConfig":
    """torchao's config of INT4 weights for CPUs, which 0.18 renamed."""
    from torchao.prototype.quantization.int4 import inference_workflow

    names = ("PrototypeInt4WeightOnlyConfig", "Int4WeightOnlyOpaqueTensorConfig")
    found = [config for name in names if (config := getattr(inference_workflow, name, None)) is not None]
    return found[0](group_size=group_size)


def int8_int4_config(group_size: int) -> "AOBaseConfig":
    """torchao's config of INT8 activations and packed INT4 weights."""
    from torchao.prototype.quantization.int4.inference_workflow import Int8DynamicActivationInt4WeightConfig

    return Int8DynamicActivationInt4WeightConfig(group_size=group_size)
