"""What ``config.json`` says of a quantized transformer besides the model's own config: its ``quantization_config``."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao._registration import METHOD
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.formats import (
    CODEBOOK_SETS,
    CODEBOOKS,
    CodebookFormat,
    CodebookSet,
    register_codebook,
    register_codebook_set,
)
from fp4dit_ao.formats.registry import BUILT_IN
from fp4dit_ao.graph_capture.sample_description import Description
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.registry import from_records
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.util.versions import version_of

FORMAT_VERSION = 3
"""Newest format version. 2: a checksum for every tensor and for the config; shards; of graph transforms, only split inputs,
under ``parts``. 3: any transforms, under ``transforms``. (1 was never released.)

A model is written in the oldest version that can say it: what readers of version 2 load right stays readable for them, and what
they would misread, such as a model whose inputs must be multiplied first, they refuse by its version.
"""
READABLE_VERSIONS = (2, FORMAT_VERSION)
_PACKAGES = ("fp4dit-ao", "torch", "torchao", "diffusers")


@dataclass
class Record:
    """How a transformer was quantized, and what its files must hold.

    Attributes:
        decisions: for every linear and attention, as ``skeleton.resolve`` left them.
        dtype: of what is not quantized.
        recipe: that was asked for.
        source: name or path of the float model.
        sample: description of the sample that its graph is captured with (``samples.describe``); None if nobody knows one.
        transforms: graph transforms that were applied before quantization, in order.
        versions: of the packages that wrote it.
        model: the model's config, class name included.
        tensors: what is stored, by name.
        constants: tensors that only a graph of the model has, kept by the module form for when it is saved.
    """

    decisions: list[Decision]
    dtype: torch.dtype
    recipe: QuantConfig | None = None
    source: str | None = None
    sample: Description | None = None
    transforms: list[GraphTransform] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {name: version_of(name) for name in _PACKAGES})
    model: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, list[int]]:
        """Input features of the parts of every linear that was split, by its name."""
        splits = [transform for transform in self.transforms if isinstance(transform, SplitInputs)]
        return {name: sizes for split in splits for name, sizes in split.parts.items()}

    @property
    def format_version(self) -> int:
        """The oldest format version that can say all of this."""
        return 2 if all(isinstance(transform, SplitInputs) for transform in self.transforms) else FORMAT_VERSION

    def to_json(self) -> dict[str, object]:
        """The ``quantization_config``."""
        configs: list[QuantConfig] = []
        layers = []
        for decision in self.decisions:
            if decision.config is not None and decision.config not in configs:
                configs.append(decision.config)
            index = None if decision.config is None else configs.index(decision.config)
            layers.append({"name": decision.name, "kind": decision.kind, "config": index, "reason": decision.reason})
        data = {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "recipe": dataclasses.asdict(self.recipe) if self.recipe else None,
            "source": self.source,
            "versions": self.versions,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sample": self.sample,
            "configs": [dataclasses.asdict(config) for config in configs],
            "codebooks": _custom_codebooks(configs),
            "layers": layers,
            **self._transforms_to_json(),
            "model": self.model,
            "tensors": {name: dataclasses.asdict(entry) for name, entry in self.tensors.items()},
        }
        plain: dict[str, object] = json.loads(json.dumps(data))
        return plain | {"sha256": digest(plain)}

    def _transforms_to_json(self) -> dict[str, object]:
        if self.format_version == 2:
            return {"parts": self.parts}
        return {"transforms": [{"name": transform.name, **transform.to_record()} for transform in self.transforms]}

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> "Record":
        """The inverse of :meth:`to_json`.

        Args:
            data: a ``quantization_config``.
            where: it was found, for messages.

        Raises:
            ValueError: of another method or format version, altered, or damaged.
        """
        method, version = data.get("quant_method"), data.get("format_version")
        if method != METHOD:
            raise ValueError(f"{where} was quantized by {method}, not by {METHOD}; load it with diffusers")
        if version not in READABLE_VERSIONS:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            readable = " and ".join(map(str, READABLE_VERSIONS))
            remedy = "update fp4dit_ao" if newer else "quantize the model again, with this version"
            raise ValueError(f"{where} has format version {version}, this fp4dit_ao reads {readable}; {remedy}")
        try:
            intact = digest({k: v for k, v in data.items() if k != "sha256"}) == data["sha256"]
        except (KeyError, TypeError, ValueError, RecursionError):
            intact = False
        if not intact:
            raise ValueError(
                f"{where} was altered since it was saved: its SHA-256 is not the recorded one; copy it again"
            )
        _register_codebooks(data.get("codebooks", {}), where)
        try:
            configs = [QuantConfig.from_dict(config) for config in data["configs"]]
            dtype = getattr(torch, data["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{data['dtype']} is no dtype")
            return Record(
                decisions=[_decision(layer, configs) for layer in data["layers"]],
                dtype=dtype,
                recipe=QuantConfig.from_dict(data["recipe"]) if data["recipe"] else None,
                source=data["source"],
                sample=data["sample"],
                transforms=_transforms_from_json(data),
                versions=dict(data["versions"]),
                model=dict(data["model"]),
                tensors={str(name): Entry.from_json(entry) for name, entry in data["tensors"].items()},
            )
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(
                f"{where} is damaged: its quantization_config cannot be read ({error!r}); copy it again"
            ) from error


def _transforms_from_json(data: Mapping[str, Any]) -> list[GraphTransform]:
    if data["format_version"] != 2:
        return from_records(data["transforms"])
    return [SplitInputs.from_record({"parts": data["parts"]})] if data["parts"] else []


def _custom_codebooks(configs: Iterable[QuantConfig]) -> dict[str, object]:
    """Codebooks and sets of them that ``configs`` name and that are not built in, by name: whoever reads the record needs them.

    A codebook is a list of levels, a set a list of codebooks.
    """
    names = {name for config in configs for name in (config.weight, config.activation, config.attention)}
    custom = sorted(name for name in names if name is not None and name not in BUILT_IN)
    levels = {name: list(CODEBOOKS[name].levels) for name in custom if name in CODEBOOKS}
    return levels | {name: list(map(list, CODEBOOK_SETS[name].books)) for name in custom if name in CODEBOOK_SETS}


def _register_codebooks(codebooks: object, where: str) -> None:
    """Makes the codebooks of a record known to ``formats.parse``.

    Raises:
        ValueError: they are none, or this process knows another codebook by one of their names.
    """
    if not isinstance(codebooks, Mapping):
        raise ValueError(f"{where} is damaged: its codebooks are {codebooks!r:.60}; copy it again")
    for name, levels in codebooks.items():
        try:
            if levels and isinstance(levels[0], list):
                register_codebook_set(CodebookSet(name, tuple(tuple(map(int, book)) for book in levels)))
            else:
                register_codebook(CodebookFormat(name, tuple(int(level) for level in levels)))
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"{where} was quantized with a codebook {name!r} that cannot be used here: {error}; load it in a process that "
                "did not register another codebook of that name"
            ) from error


def digest(data: object) -> str:
    """SHA-256 of JSON data, whatever its layout and the order of its keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_config(config: Mapping[str, object]) -> dict[str, object]:
    """The part of a diffusers config that describes the model: no private keys but the class name, as JSON."""
    own = {
        k: v for k, v in config.items() if k != "quantization_config" and (k == "_class_name" or not k.startswith("_"))
    }
    return dict(json.loads(json.dumps(own, default=str)))


def check_model(record: Record, config: Mapping[str, object], where: str) -> None:
    """Raise ``ValueError`` if a model's config is not the one that was saved."""
    found = model_config(config)
    for key, value in record.model.items():
        if found.get(key) != value:
            raise ValueError(
                f"{where} was altered since it was saved: its {key!r} is {found.get(key)!r:.60}, not {value!r:.60}; "
                "copy it again"
            )


def _decision(layer: Mapping[str, Any], configs: list[QuantConfig]) -> Decision:
    index = layer["config"]
    return Decision(str(layer["name"]), layer["kind"], None if index is None else configs[index], str(layer["reason"]))
