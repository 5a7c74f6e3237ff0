"""Other packages that quantize a model's linears, and how each is called: one entry of :data:`PEERS` per way.

Every peer quantizes the same linears as our recipes, in the type and mode in which it is fastest. Peers need not be
installed; those that cannot run on a machine are reported with their error.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from torch import nn

from fp4dit_ao.families import family_of

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

GROUP = 128
"""Group size for peers that take one; the same as in our recipes."""


@dataclass(frozen=True)
class Peer:
    """One way to quantize with one package.

    Attributes:
        package: name of the distribution in pip.
        module: name of the imported module.
        convert: quantizes the named linears of a model, which is already on its device and in ``dtype``; returns the
            model.
        mode: ``"compiled"`` runs the converted model under ``torch.compile``.
        dtype: type of all tensors that are not quantized.
    """

    package: str
    module: str
    convert: Callable[[nn.Module, Sequence[str]], nn.Module]
    mode: Literal["eager", "compiled"] = "compiled"
    dtype: str = "bfloat16"

    @property
    def installed(self) -> bool:
        """Whether the module can be imported."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # a parent package is missing
            return False

    @property
    def version(self) -> str:
        """Version of the package, or ``"not installed"``."""
        return metadata.version(self.package) if self.installed else "not installed"


def quantizable(model: nn.Module) -> list[str]:
    """Names of the linears of ``model`` that our recipes quantize: all but those that its family keeps."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    skip = family_of(model).skip
    return [name for name in linears if not any(fnmatchcase(name, glob) for glob in skip)]


# --- torchao ---------------------------------------------------------------------------------------------------------


def _torchao(config: Callable[[str], "AOBaseConfig"]) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    """Converts with torchao's ``quantize_``; ``config`` makes a config for a type of device."""

    def convert(model: nn.Module, names: Sequence[str]) -> nn.Module:
        from torchao.quantization import quantize_

        wanted = set(names)
        quantize_(model, config(next(model.parameters()).device.type), filter_fn=lambda _, name: name in wanted)
        return model

    return convert


def _int8(device: str) -> "AOBaseConfig":
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _int4(device: str) -> "AOBaseConfig":
    if device == "cpu":  # the released configs need a GPU
        from fp4dit_ao._compat.torchao_prototype import int4_cpu_config

        return int4_cpu_config(GROUP)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")


def _int8_int4_packed(device: str) -> "AOBaseConfig":
    from fp4dit_ao._compat.torchao_prototype import int8_int4_config

    return int8_int4_config(GROUP)


def _int8_int4(device: str) -> "AOBaseConfig":
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(GROUP),
    )


def _fp8(device: str) -> "AOBaseConfig":
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


# --- optimum-quanto, SDNQ, bitsandbytes ------------------------------------------------------------------------------


def _quanto(weights: str) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def convert(model: nn.Module, names: Sequence[str]) -> nn.Module:
        quanto = importlib.import_module("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, weights), include=list(names))
        quanto.freeze(model)
        return model

    return convert


def _sdnq(weights: str) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def convert(model: nn.Module, names: Sequence[str]) -> nn.Module:
        sdnq = importlib.import_module("sdnq")
        kept = [name + ".weight" for name, module in model.named_modules() if name not in set(names)]
        device = str(next(model.parameters()).device)
        converted: nn.Module = sdnq.sdnq_post_load_quant(
            model, weights_dtype=weights, use_quantized_matmul=True, add_skip_keys=False, modules_to_not_convert=kept,
            quantization_device=device, return_device=device,
        )  # fmt: skip
        return converted

    return convert


def _bitsandbytes(layer: str, **options: object) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def convert(model: nn.Module, names: Sequence[str]) -> nn.Module:
        made = getattr(importlib.import_module("bitsandbytes").nn, layer)
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            new = made(linear.in_features, linear.out_features, linear.bias is not None, **options)
            new.load_state_dict(linear.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to(linear.weight.device).requires_grad_(False))
        return model

    return convert


def _nf4(model: nn.Module, names: Sequence[str]) -> nn.Module:
    import torch

    return _bitsandbytes("Linear4bit", compute_dtype=torch.bfloat16, quant_type="nf4")(model, names)


PEERS: dict[str, Peer] = {
    "torchao INT8": Peer("torchao", "torchao", _torchao(_int8)),
    "torchao INT4 weights": Peer("torchao", "torchao", _torchao(_int4)),
    "torchao INT8 x INT4": Peer("torchao", "torchao", _torchao(_int8_int4)),
    "torchao INT8 x INT4, packed": Peer("torchao", "torchao", _torchao(_int8_int4_packed)),
    "torchao FP8": Peer("torchao", "torchao", _torchao(_fp8)),
    "quanto qint8": Peer("optimum-quanto", "optimum.quanto", _quanto("qint8")),
    "quanto qint4": Peer("optimum-quanto", "optimum.quanto", _quanto("qint4"), mode="eager"),
    "SDNQ int8": Peer("sdnq", "sdnq", _sdnq("int8")),
    "SDNQ uint4": Peer("sdnq", "sdnq", _sdnq("uint4")),
    "bitsandbytes NF4": Peer("bitsandbytes", "bitsandbytes", _nf4),
    "bitsandbytes INT8": Peer(
        "bitsandbytes", "bitsandbytes", _bitsandbytes("Linear8bitLt", has_fp16_weights=False)
    ),
}  # fmt: skip
"""All peers, by the name that tables show."""
