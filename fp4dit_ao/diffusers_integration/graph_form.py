"""``QuantizedTransformer``: a quantized graph in the place of a pipeline's ``transformer``.

This module imports diffusers; ``fp4dit_ao.QuantizedTransformer`` does so on first use.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_rebuilding, graph_tensors, tensor_files, transformer_folder
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.tensor_files import first_line
from fp4dit_ao.checkpoint.transformer_folder import SHARD_SIZE
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.diffusers_integration.module_conversion import from_graph
from fp4dit_ao.diffusers_integration.saving import refuse_unsaveable, save_pretrained
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.passes import compilation
from fp4dit_ao.passes.device_placement import convert_tensors, move_to
from fp4dit_ao.passes.transforms.registry import applied_transforms
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.tensors.levels import refuse_unpacked

_NOT_CONFIG = ("quantization_config", "_use_default_values", "_name_or_path")


@dataclass(frozen=True)
class LayerSummary:
    """One row of :meth:`QuantizedTransformer.summary`.

    Attributes:
        name: fully qualified module name.
        kind: ``"linear"``, ``"attention"`` or ``"convolution"``.
        weight: number format of the weight, or its type if it stayed in high precision; None for an attention.
        activation: number format of the inputs (of q, k and v for an attention); None if they are not quantized.
        shape: of the weight, (out_features, in_features); None for an attention.
        bytes: that the weight takes, scales included.
        quantized: whether anything of the layer is quantized.
        reason: which rule chose this, or why the layer stayed in high precision.
    """

    name: str
    kind: str
    weight: str | None
    activation: str | None
    shape: tuple[int, ...] | None
    bytes: int
    quantized: bool
    reason: str


class QuantizedTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A lowered graph with the config, the plain attributes and the call signature of the model that it was captured from.

    Args:
        graph: the lowered graph.
        model: the float model, for its config and attributes; it is not kept.
        description: of the sample that the graph was captured with (``samples.describe``).
        decisions: for every linear and attention; see ``skeleton.resolve``.
        recipe: the config that was asked for.
        source: name or path of the float model.

    Attributes:
        graph: the lowered graph, a ``GraphModule``.
        report: what ``reconstruct`` returned; None if nothing was reconstructed in this process.
    """

    # what a saved pipeline's model_index.json names, so that from_pretrained finds the class once the package is imported
    __module__ = "fp4dit_ao"
    config_name = "config.json"
    graph: GraphModule

    def __init__(
        self,
        graph: GraphModule,
        model: nn.Module,
        description: Any,
        decisions: Iterable[Decision],
        recipe: QuantConfig | None = None,
        source: str | None = None,
    ):
        super().__init__()
        config: Any = model.config
        own = {key: value for key, value in config.items() if key not in _NOT_CONFIG}
        _compat.replace_config(self, own | {"_class_name": type(model).__name__})
        # pipelines read plain numbers off their transformer, such as Hunyuan-DiT's num_heads
        for name, value in vars(model).items():
            if (
                isinstance(value, bool | int | float | str)
                and not name.startswith("_")
                and name not in ("training", "report")
            ):
                setattr(self, name, value)
        self.graph = graph
        self.description = description
        self.decisions = list(decisions)
        self.recipe = recipe
        self.source = source
        self.report: Any = None
        self._mode: Callable[[GraphModule], Callable[..., Any]] | None = None
        self._ready: tuple[GraphModule, torch.device] | None = None
        self._read: tuple[GraphModule, set[str], dict[str, Any]] | None = None
        self.eval()

    # --- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the float model's ``forward`` takes; returns ``Transformer2DModelOutput``, or a tuple if ``return_dict=False``.

        Raises:
            ValueError: an argument that the captured graph cannot honour: unknown, of another rank, or not the constant that
                was captured.
        """
        names = _compat.input_names(self.graph)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return_dict = arguments.pop("return_dict", True)
        if not torch.compiler.is_compiling():
            if len(args) > len(names):
                raise ValueError(f"{self._class} takes {len(names)} arguments, found {len(args)}")
            varying, defaults = self._signature()
            sample_description.check(self.description, defaults | arguments, f"quantized {self._class}", varying)
            self._prepare(next(x.device for _, x in sample_description.tensors(arguments)))
        output = self._run(**arguments)
        return Transformer2DModelOutput(sample=output[0]) if return_dict else output

    def _signature(self) -> tuple[set[str], dict[str, Any]]:
        """Names of the whole numbers that may vary, and defaults: read off the graph once."""
        if self._read is None or self._read[0] is not self.graph:
            parameters = inspect.signature(self.graph.forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            self._read = (self.graph, _compat.varying_numbers(self.graph), defaults)
        return self._read[1:]

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedTransformer":
        convert_tensors(self, fn)
        return self

    @property
    def _class(self) -> str:
        return str(self.config["_class_name"])

    def cache_context(self, name: str, **_: Any) -> contextlib.AbstractContextManager[None]:
        """Pipelines say through this which of their calls comes next, for caches between steps; a graph has none."""
        return contextlib.nullcontext()

    def _prepare(self, device: torch.device) -> None:
        """Bring the graph's own device constants to where the inputs are, and compile if asked."""
        if self._ready is not None and self._ready[0] is self.graph and self._ready[1] == device:
            return
        move_to(self.graph, device)
        run = self._mode(self.graph) if self._mode else self.graph
        object.__setattr__(self, "_run", run)  # not as a submodule: its tensors are the graph's
        self._ready = (self.graph, device)

    def compile_graph(self, on: bool = True) -> "QuantizedTransformer":
        """Run the graph under ``torch.compile(dynamic=True, fullgraph=True)`` from the next call on (or no longer)."""
        self._mode, self._ready = compilation.compile_graph if on else None, None
        return self

    def compile_blocks(self) -> "QuantizedTransformer":
        """Compile one block for all from the next call on: a fraction of the wait. See ``compilation.compile_blocks``."""
        self._mode, self._ready = compilation.compile_blocks, None
        return self

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' name for :meth:`compile_blocks`; arguments for ``torch.compile`` have no effect here."""
        self.compile_blocks()

    # --- placement ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the unquantized tensors."""
        return next((p.dtype for p in self.graph.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((x.device for x in (*self.graph.parameters(), *self.graph.buffers())), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> "QuantizedTransformer":
        """Move to a device, or to another floating-point type for everything that is not quantized.

        Types are part of a captured graph, so another type captures the graph anew (seconds); codes and scales stay.
        """
        device, dtype = _compat.parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            self._recapture(dtype)
        if device is not None:
            super().to(device)
        return self

    def half(self, *args: Any) -> "QuantizedTransformer":
        return self.to(torch.float16)

    def bfloat16(self) -> "QuantizedTransformer":
        return self.to(torch.bfloat16)

    def float(self, *args: Any) -> "QuantizedTransformer":
        return self.to(torch.float32)

    def _recapture(self, dtype: torch.dtype) -> None:
        refuse_unpacked(graph_tensors.state_of(self.graph).values(), f"changing the type to {dtype}")
        stored: dict[str, Tensor] = {}
        for name, x in graph_tensors.state_of(self.graph).items():
            quantized = isinstance(x, TorchAOBaseTensor)
            parts = graph_tensors.flatten(name, x.detach())
            stored |= {k: v.to(dtype) if v.is_floating_point() and not quantized else v for k, v in parts.items()}
        graph = graph_rebuilding.build(
            empty_model(dict(self.config)),
            self.description,
            self.decisions,
            dtype,
            transforms=applied_transforms(self.graph),
        )
        graph_tensors.fill(graph, stored)
        self.graph = graph

    # --- what it is made of ------------------------------------------------------------------------------------------

    def summary(self) -> list[LayerSummary]:
        """One row per linear, attention and convolution of the graph."""
        weights = dict(self.graph.named_parameters())
        rows = []
        for decision in self.decisions:
            config = decision.config
            if decision.kind == "attention":
                fmt = config.attention if config else None
                rows.append(
                    LayerSummary(decision.name, "attention", None, fmt, None, 0, fmt is not None, decision.reason)
                )
                continue
            weight = weights.get(f"{decision.name}.weight")
            shape = tuple(weight.shape) if weight is not None else None
            size = (
                sum(x.nbytes for x in graph_tensors.flatten("", weight.detach()).values()) if weight is not None else 0
            )
            kept = str(weight.dtype).removeprefix("torch.") if weight is not None else None
            name = config.weight if config else kept
            activation = config.activation if config else None
            quantized = config is not None
            rows.append(
                LayerSummary(decision.name, decision.kind, name, activation, shape, size, quantized, decision.reason)
            )
        return rows

    def nbytes(self) -> int:
        """Bytes of every tensor that the graph reads."""
        state = graph_tensors.state_of(self.graph)
        return sum(
            part.nbytes for name, x in state.items() for part in graph_tensors.flatten(name, x.detach()).values()
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def quantization_record(self) -> Record:
        """How this transformer was quantized."""
        transforms = applied_transforms(self.graph)
        own = model_config(self.config)
        return Record(self.decisions, self.dtype, self.recipe, self.source, self.description, transforms, model=own)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, codes and scales apart."""
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
        """Write ``config.json`` and safetensors files into a folder; ``options`` are those of diffusers' method.

        Raises:
            ValueError: ``safe_serialization=False``: nothing is pickled; or the weights were unpacked.
            OSError: the folder cannot be written.
        """
        refuse_unsaveable(self)
        save_pretrained(
            self,
            self.quantization_record(),
            self.tensors_to_save(),
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **options,
        )

    def to_modules(self) -> nn.Module:
        """The diffusers model that this was made from, in the module form.

        For LoRA, offloading and whatever else needs the model's modules. Tensors are shared.
        """
        model: nn.Module = from_graph(self.quantization_record(), self.tensors_to_save())
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "QuantizedTransformer":
        """What :meth:`save_pretrained` wrote, in ``dtype`` (or ``torch_dtype``), which is as saved if None.

        Other arguments of diffusers' ``from_pretrained`` but ``subfolder`` have no effect here.

        Raises:
            ValueError: the folder holds something else, or is damaged; see :func:`load_graph`.
        """
        model = load_graph(Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or ""))
        dtype = dtype or kwargs.get("torch_dtype")
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def load_graph(folder: str | Path) -> QuantizedTransformer:
    """The transformer in ``folder`` as a graph, on the CPU. Its float weights are never made.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a foreign folder, another format version, a truncated or altered file, tensors that do not fit.
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
        # a model may also have tensors that it does not use in calls like the captured one
        graph_tensors.fill(graph, {name: x for name, x in stored.items() if name in read or name not in own})
    except Exception as error:  # whatever a config that fits nothing makes a model do
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error
    return QuantizedTransformer(graph, model, record.sample, record.decisions, record.recipe, record.source)
