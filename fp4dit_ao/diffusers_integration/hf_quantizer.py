"""Plug-in for diffusers: a quantization config, and the quantizer that ``from_pretrained`` calls.

``import fp4dit_ao`` registers both; see ``_registration``. Quantized models load as they were saved. Float models are
quantized while they are read, weight by weight.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao._registration import METHOD
from fp4dit_ao.checkpoint.quantization_record import Record, check_model
from fp4dit_ao.config import DEFAULT_RECIPE, QuantConfig
from fp4dit_ao.diffusers_integration import module_form
from fp4dit_ao.diffusers_integration.float_source import widened
from fp4dit_ao.diffusers_integration.module_slots import Slots, quantized_linears
from fp4dit_ao.families.dtypes import main_dtype
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.split_inputs import split_modules, whole_name
from fp4dit_ao.schemes import scheme_of

if TYPE_CHECKING:
    from diffusers import ModelMixin


CODES = 4 / 4.5
"""Part of a weight's memory that its codes take, the rest being scales: NVFP4's, the least of all recipes."""


class _Method(StrEnum):
    FP4DIT_AO = METHOD


class FP4DiTConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Config with which ``from_pretrained`` quantizes a float transformer: nearest rounding, without calibration data.

    ``PipelineQuantizationConfig(quant_mapping={"transformer": FP4DiTConfig("w4a6")})`` quantizes one component of a
    pipeline.

    Args:
        recipe: a name in ``config.RECIPES``, or a config.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        sample: keyword arguments of one ``forward``, for models of families that the package does not know.
        transforms: graph transforms that need no calibration data: ``"split_inputs"``.

    Raises:
        ValueError: the recipe or a transform is unknown, or a transform needs calibration data.
    """

    def __init__(
        self,
        recipe: str | QuantConfig = DEFAULT_RECIPE,
        skip: Sequence[str] = (),
        sample: Mapping[str, object] | None = None,
        transforms: Sequence[str | GraphTransform] = (),
    ):
        module_form.without_data(transforms)
        if isinstance(recipe, str):
            QuantConfig.from_name(recipe)
        self.quant_method = _Method.FP4DIT_AO
        self.recipe, self.skip, self.sample = recipe, tuple(skip), sample
        self.transforms = tuple(transforms)
        self.stored: dict[str, object] | None = None
        """``quantization_config`` of a model that is already quantized, else None."""

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, object], return_unused_kwargs: bool = False, **kwargs: object
    ) -> "FP4DiTConfig | tuple[FP4DiTConfig, dict[str, object]]":
        """Config from the content of ``config.json``, which is checked when it is used."""
        config = cls()
        config.stored = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, object]:
        """Short form for printing; ``save_pretrained`` of the quantized model writes the full record."""
        recipe = self.recipe if isinstance(self.recipe, str) else dataclasses.asdict(self.recipe)
        return {"quant_method": METHOD, "recipe": recipe, "skip": list(self.skip)}

    def __repr__(self) -> str:
        return f"FP4DiTConfig(recipe={self.recipe!r}, skip={self.skip!r})"


class FP4DiTDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts stored codes and scales into a model that diffusers is loading, or quantizes its float weights on the way
    in.

    Attributes:
        record: how the model was quantized.
    """

    required_packages = ("accelerate",)
    use_keep_in_fp32_modules = True
    """Whether what a model keeps in float32 stays so; read by diffusers."""

    def __init__(self, quantization_config: FP4DiTConfig, record: Record | None = None, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.record = record
        self._slots: Slots | None = None
        self._linears: dict[str, QuantConfig] = {}

    def _process_model_before_weight_loading(self, model: "ModelMixin", **kwargs: object) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            self.record = Record.from_json(config.stored or {}, "its config.json")
            config.recipe = self.record.recipe or config.recipe
            check_model(self.record, dict(model.config) | {"_class_name": type(model).__name__}, "its config.json")
            self._slots = Slots(model, self.record)
        else:
            self.record = module_form.decide(
                model, config.recipe, skip=config.skip, sample=config.sample, transforms=config.transforms
            )
            self._linears = dict(quantized_linears(self.record))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized and missing_keys:
            raise ValueError(
                f"the weights lack tensor {sorted(missing_keys)[0]} ({len(missing_keys)} in all); copy the folder again"
            )
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: object
    ) -> bool:
        name, _, leaf = param_name.rpartition(".")
        quantized = name in self._linears or (self.record is not None and name in self.record.parts)
        return self._slots is not None or (leaf == "weight" and quantized)

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        raise ValueError(
            f"tensor {param_name} is {tuple(loaded_param.shape)}, where the model has {tuple(current_param.shape)}; "
            "copy the folder again"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        assert self.record is not None, "diffusers prepares the model before it loads weights"
        if self._slots is not None:
            if unexpected_keys:
                raise ValueError(
                    f"the weights hold tensor {unexpected_keys[0]}, which config.json does not know; copy the folder again"
                )
            x = state_dict[param_name].clone()  # param_value is cast, scales too; cloned as in tensor_files.read
            self.record.tensors[param_name].check(param_name, x)
            self._slots.put(param_name, x.to(target_device), param_value.dtype)
        else:
            name = param_name.rpartition(".")[0]
            wanted = dtype or model.get_submodule(name).weight.dtype  # type: ignore[union-attr]
            param_value = widened(param_name, param_value, wanted, unexpected_keys or ())  # type: ignore[arg-type]
            model.get_submodule(name).weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
            split_modules(model, {whole: sizes for whole, sizes in self.record.parts.items() if whole == name})
            for linear, config in self._linears.items():
                if whole_name(linear) == name:
                    module_form.quantize_linear(model, linear, config)

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, object]:
        """Sizes by which accelerate spreads a model over devices, of float weights that will be quantized while they load."""
        from accelerate.utils import CustomDtype

        found: dict[str, object] = {}
        for linear, config in self._linears.items():
            name = f"{whole_name(linear)}.weight"
            shape = model.get_parameter(name).shape
            stored = sum(part.nbytes for part in scheme_of(config).empty_parts(shape, config).values())
            found[name] = CustomDtype.INT4 if stored < shape.numel() else torch.int8
        return found

    def adjust_max_memory(self, max_memory: dict[str, int]) -> dict[str, float]:
        """Leaves room for scales, which those sizes do not count."""
        return {device: size * (CODES if self._linears else 1.0) for device, size in max_memory.items()}

    def _process_model_after_weight_loading(self, model: "ModelMixin", **kwargs: object) -> "ModelMixin":
        if self._slots is not None:
            self._slots.close(main_dtype(model.named_parameters(), _compat.kept_in_float32(model)))
            self._slots = None
        return module_form.finish(model, self)

    def _dequantize(self, model: "ModelMixin") -> "ModelMixin":
        return module_form.dequantize_modules(model)

    @property
    def is_serializable(self) -> bool:
        """Read only by diffusers' own ``save_pretrained``, which would fail because codes have no storage.

        Raises:
            ValueError: always, with the call that works.
        """
        raise ValueError(
            "diffusers' own save_pretrained cannot write low-bit weights; call the instance's, model.save_pretrained(folder)"
        )

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FP4DiTConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = FP4DiTDiffusersQuantizer
