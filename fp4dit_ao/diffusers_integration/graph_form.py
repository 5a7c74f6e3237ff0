"""Graph form: ``QuantizedTransformer``, a quantized graph that replaces a pipeline's ``transformer``.

This module imports diffusers; ``fp4dit_ao.QuantizedTransformer`` imports it on first use.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_rebuilding, graph_tensors, tensor_files, transformer_folder
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.transformer_folder import SHARD_SIZE
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.diffusers_integration.combination_search import CombinationReport
from fp4dit_ao.diffusers_integration.component_types import stand_ins
from fp4dit_ao.diffusers_integration.folders_and_devices import one_device, resolve_folder
from fp4dit_ao.diffusers_integration.layer_summary import (
    LayerSummary,
    beside_weights,
    bits_per_weight,
    layer_lines,
    layer_summaries,
    unit_of,
)
from fp4dit_ao.diffusers_integration.module_conversion import from_graph
from fp4dit_ao.diffusers_integration.module_form import memory_footprint
from fp4dit_ao.diffusers_integration.module_methods import ModuleMethodsRefused
from fp4dit_ao.diffusers_integration.saving import refuse_unsaveable, save_pretrained
from fp4dit_ao.families.calls import call_of
from fp4dit_ao.families.dtypes import is_kept, main_dtype
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.passes import compilation
from fp4dit_ao.passes.device_placement import convert_tensors, move_to
from fp4dit_ao.passes.fine_tuning import FineTuneReport
from fp4dit_ao.passes.graph_products import weight_named
from fp4dit_ao.passes.reconstruction.report import ReconstructionReport
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.registry import applied_transforms
from fp4dit_ao.passes.weight_unpacking import refuse_unpacked, times_unpacked
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.sentences import first_line

__all__ = ["LayerSummary", "QuantizedTransformer", "load_graph"]

_NOT_CONFIG = ("quantization_config", "_use_default_values", "_name_or_path")


class QuantizedTransformer(ModuleMethodsRefused, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Lowered graph with the config, the plain attributes and the call signature of the model that it was captured
    from.

    Args:
        graph: the lowered graph.
        model: the float model, for its config and attributes; it is not kept.
        description: description of the captured sample; see ``sample_description.describe``.
        decisions: decisions for every linear and attention; see ``graph_rebuilding.resolve``.
        recipe: the requested config.
        source: name or path of the float model.

    Attributes:
        graph: the lowered graph, a ``GraphModule``.
        report: result of ``reconstruct``; None if nothing was reconstructed in this process.
        fine_tuning_report: result of fine-tuning; None if nothing was fine-tuned in this process.
        combination_report: what a search for the best combination of methods tried; None without one.
    """

    # model_index.json of a saved pipeline names this module, so that from_pretrained finds the class
    __module__ = "fp4dit_ao"
    config_name = "config.json"
    lowered: GraphModule

    def __init__(
        self,
        graph: GraphModule,
        model: ModelMixin,
        description: sample_description.Description,
        decisions: Iterable[Decision],
        recipe: QuantConfig | None = None,
        source: str | None = None,
    ):
        super().__init__()
        config = model.config
        own = {key: value for key, value in config.items() if key not in _NOT_CONFIG}
        self._class = type(model).__name__
        _compat.replace_config(self, FrozenDict(own | {"_class_name": self._class}))
        # pipelines read plain attributes of their transformer, such as Hunyuan-DiT's num_heads
        for name, value in vars(model).items():
            plain = isinstance(value, bool | int | float | str) and not name.startswith("_")
            if plain and name not in ("training", "report", "fine_tuning_report", "combination_report"):
                setattr(self, name, value)
        self.lowered = graph
        self.description = description
        self.decisions = list(decisions)
        self.recipe = recipe
        self.source = source
        self.report: ReconstructionReport | None = None
        self.fine_tuning_report: FineTuneReport | None = None
        self.combination_report: CombinationReport | None = None
        self._mode: Callable[[GraphModule], nn.Module] | None = None
        self._ready: tuple[GraphModule, torch.device, int] | None = None
        self._read: tuple[GraphModule, tuple[list[str], set[str], dict[str, object]]] | None = None
        self._set_up()
        self.eval()

    @property
    def graph(self) -> GraphModule:
        """The lowered graph, held as the submodule ``lowered``: ``torch.export.export`` of this module makes a ``GraphModule``,
        which has a ``graph`` of its own."""
        return self.lowered

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__("lowered" if name == "graph" else name, value)

    # --- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *args: object, **kwargs: object) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Runs the graph with the arguments of the float model's ``forward``.

        Returns:
            ``Transformer2DModelOutput``, or a tuple if ``return_dict=False``.

        Raises:
            ValueError: an argument is unknown, has another rank, or differs from the captured constant.
        """
        names, varying, defaults = self._signature()
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return_dict = arguments.pop("return_dict", True)
        if len(args) > len(names):
            raise ValueError(f"{self._class} takes {len(names)} arguments, found {len(args)}")
        arguments = call_of(self._class).adapt(arguments)
        sample_description.check(self.description, defaults | arguments, f"quantized {self._class}", varying)
        if (
            torch.compiler.is_compiling()
        ):  # by torch.compile of this module, to which set-up would be part of every call
            output = self.graph(**arguments)
        else:
            self._prepare(next(x.device for _, x in sample_description.tensors(arguments)))
            output = self._run(**arguments)
        return Transformer2DModelOutput(sample=output[0]) if return_dict else output

    def _signature(self) -> tuple[list[str], set[str], dict[str, object]]:
        """Names of arguments, of those whole numbers among them that may vary, and default values; read once per
        graph."""
        if self._read is None or self._read[0] is not self.graph:
            parameters = inspect.signature(self.graph.forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            self._read = (self.graph, (_compat.input_names(self.graph), _compat.varying_numbers(self.graph), defaults))
        return self._read[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedTransformer":
        before = self.device
        convert_tensors(self, fn)
        if self.device != before:
            self._ready = None  # what was compiled holds weights where they were
        self._set_up()
        return self

    def _set_up(self) -> None:
        """Does before the first call what no call that ``torch.compile`` traces can do."""
        self._signature()
        if not any(x.is_meta for x in (*self.graph.parameters(), *self.graph.buffers())):
            move_to(self.graph, self.device)

    def cache_context(self, name: str, **_: object) -> contextlib.AbstractContextManager[None]:
        """Does nothing: pipelines announce their next call with it, for caches between steps, which a graph does not
        have."""
        return contextlib.nullcontext()

    def _prepare(self, device: torch.device) -> None:
        """Moves the graph's device constants to ``device``, and compiles the graph if asked, once for these weights."""
        if self.device.type == "meta":
            raise ValueError(
                f"the weights of this quantized {self._class} are on the meta device: a graph cannot be offloaded layer by "
                "layer; use pipe.enable_model_cpu_offload(), or the module form, load_pipeline(folder, form='module')"
            )
        changes = times_unpacked(self.graph)
        if self._ready is not None and self._ready[0] is self.graph and self._ready[1:] == (device, changes):
            return
        move_to(self.graph, device)
        run = self._mode(self.graph) if self._mode else self.graph
        object.__setattr__(self, "_run", run)  # not registered as a submodule: it shares the graph's tensors
        self._ready = (self.graph, device, changes)

    def compile_graph(self, on: bool = True, *, joined: bool = True) -> "QuantizedTransformer":
        """Runs the graph under ``torch.compile(dynamic=True, fullgraph=True)`` from the next call on; ``on=False``
        undoes it.

        Linears that read the same value, such as q, k and v, are one product then, with equal results; ``joined=False``
        leaves them apart.
        """
        self._mode, self._ready = functools.partial(compilation.compile_graph, joined=joined) if on else None, None
        return self

    def compile_blocks(self, *, joined: bool = True) -> "QuantizedTransformer":
        """Compiles each kind of block once, from the next call on, in a fraction of the time; see
        ``compilation.compile_blocks``, and :meth:`compile_graph` for ``joined``."""
        self._mode, self._ready = functools.partial(compilation.compile_blocks, joined=joined), None
        return self

    def compile_repeated_blocks(self, *args: object, **kwargs: object) -> None:
        """Same as :meth:`compile_blocks`, under diffusers' name; arguments for ``torch.compile`` are ignored."""
        self.compile_blocks()

    # --- placement ---------------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> tuple[str, ...]:
        return _compat.kept_in_float32(self._float_class)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the unquantized tensors."""
        return main_dtype(self.graph.named_parameters(), self._kept)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next((x.device for x in (*self.graph.parameters(), *self.graph.buffers())), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> "QuantizedTransformer":
        """Moves to a device, or casts everything that is not quantized to another floating-point type.

        Types are part of a captured graph, so a cast captures the graph again (seconds); codes and scales stay.
        """
        device, dtype = _compat.parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            self._recapture(dtype)
        if device is not None:
            super().to(device)
        return self

    def half(self, *args: object) -> "QuantizedTransformer":
        return self.to(torch.float16)

    def bfloat16(self) -> "QuantizedTransformer":
        return self.to(torch.bfloat16)

    def float(self, *args: object) -> "QuantizedTransformer":
        return self.to(torch.float32)

    def _recapture(self, dtype: torch.dtype) -> None:
        refuse_unpacked(self.graph, f"changing the type to {dtype}")
        stored: dict[str, Tensor] = {}
        scales = graph_tensors.static_scales(self.graph)
        for name, x in graph_tensors.state_of(self.graph).items():
            fixed = name in scales or isinstance(x, TorchAOBaseTensor)
            parts = graph_tensors.flatten(name, x.detach())
            cast = not fixed and not is_kept(name, self._kept)
            stored |= {k: v.to(dtype) if v.is_floating_point() and cast else v for k, v in parts.items()}
        self._rebuild(dtype, stored, applied_transforms(self.graph))

    def _rebuild(self, dtype: torch.dtype, stored: Mapping[str, Tensor], transforms: Sequence[GraphTransform]) -> None:
        """Captures the graph anew and fills it with ``stored``, plain tensors by name."""
        dtypes = {name: x.dtype for name, x in stored.items()}
        empty = empty_model(dict(self.config))
        graph = graph_rebuilding.build(empty, self.description, self.decisions, dtype, dtypes, transforms=transforms)
        graph_tensors.fill(graph, stored)
        self.lowered = graph
        self._set_up()

    # --- copies ------------------------------------------------------------------------------------------------------

    def __copy__(self) -> "QuantizedTransformer":
        return self._with_state(dict(vars(self)))

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizedTransformer":
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(dict(vars(self)), memo))
        return new

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickles codes and scales, without the graph: unpickling captures it again (seconds).

        Raises:
            ValueError: the weights were unpacked.
        """
        refuse_unpacked(self.graph, "pickling a quantized transformer")
        state = {name: value for name, value in vars(self).items() if name not in ("_run", "_ready", "_read")}
        state |= {"_modules": {}, "_ready": None, "_read": None}
        return _unpickled, (type(self), state, self.dtype, self.tensors_to_save(), applied_transforms(self.graph))

    @classmethod
    def _with_state(cls, state: dict[str, object]) -> "QuantizedTransformer":
        new = cls.__new__(cls)
        new.__setstate__(state)
        return new

    # --- what it is made of ------------------------------------------------------------------------------------------

    def summary(self) -> list[LayerSummary]:
        """One row per linear, attention and convolution of the graph."""
        return layer_summaries(self.decisions, dict(self.graph.named_parameters()))

    def __repr__(self) -> str:
        """Layers with their formats and the units that compute them where the tensors are; the modules of a graph are empty."""
        rows, parameters, device = self.summary(), dict(self.graph.named_parameters()), self.device

        def unit(row: LayerSummary) -> str:
            weight = weight_named(parameters, row.name)
            return unit_of(row, weight if isinstance(weight, LowBitWeight) else None, device)

        quantized = sum(row.quantized for row in rows)
        rest = str(self.dtype).removeprefix("torch.")
        bits = bits_per_weight(rows, beside_weights(self.graph, rows))
        head = (
            f"{type(self).__name__}({self._class}: {quantized} of {len(rows)} layers quantized, {bits:.2f} bits per quantized "
            f"weight, {self.nbytes() / 1e6:.2f} MB, the rest in {rest}, on {device})"
        )
        return "\n  ".join([head, *layer_lines(rows, unit)])

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all tensors as they are stored, without buffers if asked; see :meth:`nbytes`."""
        return memory_footprint(self, return_buffers)

    def nbytes(self) -> int:
        """Bytes of all tensors that the graph reads."""
        return sum(x.nbytes for x in graph_tensors.state_of(self.graph).values())

    # --- files -------------------------------------------------------------------------------------------------------

    def quantization_record(self) -> Record:
        """Record of how this transformer was quantized."""
        transforms = applied_transforms(self.graph)
        own = model_config(self.config)
        return Record(self.decisions, self.dtype, self.recipe, self.source, self.description, transforms, model=own)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Plain tensors that the graph reads, by name, with codes and scales as separate tensors."""
        state = graph_tensors.state_of(self.graph)
        return {part: y for name, x in state.items() for part, y in graph_tensors.flatten(name, x.detach()).items()}

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = SHARD_SIZE,
        **options: Any,
    ) -> None:
        """Writes ``config.json`` and safetensors files into a folder; ``options`` are those of diffusers' method.

        Raises:
            ValueError: ``safe_serialization`` is False, which would pickle, or the weights were unpacked.
            OSError: the folder cannot be written.
        """
        refuse_unsaveable(self)
        save_pretrained(
            self, self.quantization_record(), self.tensors_to_save(), save_directory, safe_serialization=safe_serialization,
            variant=variant, max_shard_size=max_shard_size, **options,
        )  # fmt: skip

    def to_modules(self) -> nn.Module:
        """Converts to the module form, for LoRA, offloading and all else that needs the model's modules; tensors are
        shared."""
        refuse_unpacked(self.graph, "to_modules()")
        model: nn.Module = from_graph(self.quantization_record(), self.tensors_to_save())
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, object], **kwargs: object) -> nn.Module:
        """Tensors on the meta device, as large as those of the quantized model that ``config`` describes, and no model:
        ``from_pretrained(folder, device_map="balanced")`` of a pipeline compares sizes of components before it loads them.

        Raises:
            ValueError: ``config`` describes no quantized model.
        """
        found = config.get("quantization_config")
        record = Record.from_json(found if isinstance(found, Mapping) else {}, "the config")
        sizes = nn.Module()
        for index, entry in enumerate(record.tensors.values()):
            x = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
            sizes.register_buffer(f"tensor_{index}", x)
        return sizes

    @classmethod
    @plain_mode()
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "QuantizedTransformer":
        """Loads what :meth:`save_pretrained` wrote, cast to ``dtype`` (or ``torch_dtype``), or as saved if None.

        Of diffusers' other arguments those have an effect that say where the model is (``subfolder``, ``revision``,
        ``cache_dir``, ``local_files_only``, ``token``, ``force_download``) and ``device_map``, which names one device.

        Raises:
            FileNotFoundError: there is no such folder, and no such repository on the hub.
            ValueError: the folder holds something else, or is damaged, see :func:`load_graph`; or ``device_map`` names several
                devices.
        """
        device, subfolder = one_device(kwargs.pop("device_map", None)), kwargs.pop("subfolder", None) or ""
        model = load_graph(resolve_folder(pretrained_model_name_or_path, subfolder or None, **kwargs) / subfolder)
        dtype = dtype or kwargs.get("torch_dtype")
        model = model.to(dtype) if isinstance(dtype, torch.dtype) else model
        return model if device is None else model.to(device)


def load_graph(folder: str | Path) -> QuantizedTransformer:
    """Loads the transformer in ``folder`` as a graph, on the CPU, without allocating float weights.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: the folder holds something else or has another format version, a file is truncated or altered, or
            tensors do not fit the model.
    """
    folder = Path(folder)
    record = transformer_folder.read_record(folder)
    if record.sample is None:
        raise ValueError(f"{folder} does not say how to capture its graph; load it with form='module'")
    stored = dict(tensor_files.read(folder, record.tensors))
    model = transformer_folder.empty_model_of(folder, record)
    own = dict(graph_tensors.tensors_of(model))
    try:
        dtypes = {name: x.dtype for name, x in stored.items()}
        graph = graph_rebuilding.build(
            model, record.sample, record.decisions, record.dtype, dtypes, transforms=record.transforms
        )
        read = graph_tensors.state_of(graph)
        # a model may have tensors that calls like the captured one do not use
        graph_tensors.fill(graph, {name: x for name, x in stored.items() if name in read or name not in own})
    except Exception as error:  # a config that does not fit can make a model raise anything
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error
    return QuantizedTransformer(graph, model, record.sample, record.decisions, record.recipe, record.source)


def _unpickled(
    cls: type[QuantizedTransformer],
    state: dict[str, object],
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
    transforms: Sequence[GraphTransform],
) -> QuantizedTransformer:
    """Inverse of ``QuantizedTransformer.__reduce_ex__``."""
    new = cls._with_state(state)
    new._rebuild(dtype, tensors, transforms)
    return new


_compat.before_from_pipe(DiffusionPipeline, stand_ins)
