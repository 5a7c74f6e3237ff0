"""Conversion to the module form: from a float model, from a graph, and from a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fp4dit_ao.checkpoint import tensor_files, transformer_folder
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.quantization_record import Record
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.config import DEFAULT_RECIPE, QuantConfig
from fp4dit_ao.diffusers_integration.float_source import check_source
from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTConfig, FP4DiTDiffusersQuantizer
from fp4dit_ao.diffusers_integration.module_form import decide, finish, quantize_linear
from fp4dit_ao.diffusers_integration.module_slots import Slots, check_online, quantized_linears
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.sentences import first_line

if TYPE_CHECKING:
    from diffusers import ModelMixin

BUFFER_LIMIT = 1 << 30
"""Most bytes of buffers, such as position tables, that a model may compute while it is loaded."""


@plain_mode()
def quantize_modules(
    model: "ModelMixin",
    recipe: str | QuantConfig = DEFAULT_RECIPE,
    *,
    skip: Sequence[str] = (),
    sample: Mapping[str, object] | None = None,
    source: str | None = None,
    transforms: Sequence[str | GraphTransform] = (),
) -> "ModelMixin":
    """Quantizes a diffusers model in place with nearest rounding, one weight at a time, without calibration.

    Args:
        model: the float model.
        recipe: a name in ``config.RECIPES``, adapted to the model's family; or a config, used unchanged.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        sample: keyword arguments of one ``forward``, with which linears before a gate are found in the model's graph;
            random ones if None and the family is known.
        source: name or path of the float model, for the record.
        transforms: graph transforms that need no calibration data: ``"split_inputs"``.

    Returns:
        ``model``; its ``save_pretrained`` writes what ``from_pretrained`` and ``load_pipeline`` read.

    Raises:
        ValueError: the recipe or a transform is unknown, needs calibration data, or does not fit the model.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            f"quantize_modules takes models of diffusers, and {type(model).__name__} is none (it has no config); quantize its "
            "graph: prepare_pt2e(capture(model, sample), FP4DiTQuantizer().set_global(w4a6()))"
        )
    check_source(model)
    leave_inference_mode(model)
    record = decide(model, recipe, skip=skip, sample=sample, source=source, transforms=transforms)
    for transform in record.transforms:
        transform.apply_to_modules(model)
    for name, config in quantized_linears(record):
        quantize_linear(model, name, config)
    quantizer = FP4DiTDiffusersQuantizer(FP4DiTConfig(recipe, skip=skip), record, pre_quantized=False)
    return finish(model, quantizer)


def from_graph(record: Record, tensors: Mapping[str, Tensor]) -> "ModelMixin":
    """Converts a quantized graph to the module form; tensors, and so learned roundings, are shared.

    Args:
        record: how the graph was quantized.
        tensors: its plain tensors, by name.

    Raises:
        ValueError: the graph has static input ranges, which only the graph form computes.
    """
    record.tensors = {name: Entry.unchecked(x) for name, x in tensors.items()}
    slots = Slots(empty_model(record.model, buffers=True), record)
    for name, x in tensors.items():
        slots.put(name, x)
    return finish(slots.close(), _quantizer_of(record))


def load_modules(folder: str | Path) -> "ModelMixin":
    """Loads the transformer in ``folder`` in the module form, on the CPU, in the type that it was saved in.

    Equal to ``from_pretrained`` of its class.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: as for ``graph_form.load_graph``, or the model has static input ranges, which only a graph computes.
    """
    folder = Path(folder)
    record = transformer_folder.read_record(folder)
    check_online(record)
    stored = dict(tensor_files.read(folder, record.tensors))
    model = transformer_folder.empty_model_of(folder, record)
    made = [x for name, x in model.named_buffers() if name not in record.tensors]
    if sum(x.nbytes for x in made) > BUFFER_LIMIT:
        raise ValueError(f"{folder} is damaged: its model makes tables larger than any known model's; copy it again")
    if made:
        model = transformer_folder.empty_model_of(folder, record, buffers=True)
    try:
        slots = Slots(model, record)
        for name, x in stored.items():
            slots.put(name, x)
        return finish(slots.close(), _quantizer_of(record))
    except Exception as error:
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error


def _quantizer_of(record: Record) -> FP4DiTDiffusersQuantizer:
    """Diffusers quantizer of a model that was quantized according to ``record``."""
    return FP4DiTDiffusersQuantizer(FP4DiTConfig(record.recipe or DEFAULT_RECIPE), record=record)
