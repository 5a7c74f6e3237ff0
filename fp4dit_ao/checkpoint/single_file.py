"""A quantized transformer as one safetensors file for other tools; the layout is described in docs/single_file.md.

The file says of itself all that is needed to use it: the levels that codes stand for, which weights have which, and how inputs
are quantized. :func:`read_single_file` reads it with NumPy alone.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from fp4dit_ao.checkpoint import tensor_files, transformer_folder
from fp4dit_ao.formats import FloatFormat, parse
from fp4dit_ao.schemes import SCHEMES, scheme_of
from fp4dit_ao.schemes.scheme import Arrays, Description, describe_format

LAYOUT = "fp4dit_ao.single_file"
LAYOUT_VERSION = 1
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?", "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip
"""NumPy's view of the bytes, by safetensors' name. The reader is our own because ``safe_open(framework="numpy")`` knows neither
bfloat16 nor 8-bit floats."""
_FIRST_SCHEME = "grouped"
"""Scheme of layers in files that name none: when they were written, it was the only one that could be read."""
_HEADER_LIMIT = 100_000_000
"""Bytes; safetensors' own."""


def export_single_file(folder: str | Path, out: str | Path) -> None:
    """Write the transformer that was saved in ``folder`` as one file, whole or not at all.

    Args:
        folder: of a quantized transformer, as ``save_pretrained`` wrote it.
        out: a ``.safetensors`` file; replaced if it exists.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: another folder, or a damaged one.
        OSError: ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    record = transformer_folder.read_record(folder)
    beyond = next((transform.name for transform in record.transforms if not transform.fits_single_file), None)
    if beyond is not None:
        raise ValueError(
            f"{folder} was changed by the transform {beyond!r}, which layout {LAYOUT_VERSION} of single files cannot describe; "
            "load the folder itself, or quantize without it"
        )
    if any(x.config is not None and x.config.attention_probabilities is not None for x in record.decisions):
        raise ValueError(
            f"{folder} was quantized with attention_probabilities, which layout {LAYOUT_VERSION} of single files cannot "
            "describe; load the folder itself, or quantize without it"
        )
    tensors = dict(tensor_files.read(folder, record.tensors))
    formats: dict[str, object] = {}
    layers: dict[str, object] = {}
    for decision in record.decisions:
        config = decision.config
        if config is None:
            continue
        scheme, attends = scheme_of(config), decision.kind == "attention"
        inputs = config.attention if attends else config.activation
        inputs = None if inputs is None else str(parse(inputs))
        layer: dict[str, object] = {
            "kind": decision.kind,
            "input": inputs,
            "input_scale": scheme.input_scale(config, attends),
        }
        if inputs is not None:
            formats[inputs] = describe_format(inputs)
        if not attends:
            described = scheme.describe(config)
            layer |= {"scheme": config.scheme} | described
            formats[str(described["weight"])] = scheme.describe_format(config)
        layers[decision.name] = layer
    metadata = {
        "format": "pt",
        "layout": LAYOUT,
        "layout_version": LAYOUT_VERSION,
        "model": record.model,
        "source": record.source,
        "recipe": dataclasses.asdict(record.recipe) if record.recipe else None,
        "versions": record.versions,
        "formats": formats,
        "layers": layers,
        "parts": record.parts,
        "input_scales": {
            name: scale for transform in record.transforms for name, scale in transform.input_scales().items()
        },
        "sha256": {name: entry.sha256 for name, entry in record.tensors.items()},
    }
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
        tensor_files.sort_metadata(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class SingleFile:
    """What :func:`read_single_file` found.

    Attributes:
        tensors: by name, as stored; bfloat16, E4M3 and E8M0 widened to float32.
        metadata: of the file, with JSON values parsed.
    """

    tensors: Arrays
    metadata: Mapping[str, Any]

    def codes(self, layer: str) -> NDArray[np.uint8]:
        """uint8 ``(out_features, in_features)`` of a quantized linear."""
        packed = self.tensors[f"{layer}.weight.qdata"]
        if self._format(layer)["bits"] > 4:
            return packed
        return np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)

    def weight(self, layer: str) -> NDArray[np.float32]:
        """float32 ``(out_features, in_features)`` of a linear: codes and scales multiplied out if it is quantized."""
        found = self.metadata["layers"].get(layer, {})
        if found.get("weight") is None:
            return self.tensors[f"{layer}.weight"].astype(np.float32)
        prefix = f"{layer}.weight."
        parts = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        scheme = SCHEMES.find(found.get("scheme", _FIRST_SCHEME))
        return scheme.dequantize(self.codes(layer), parts, found, self._format(layer))

    def _format(self, layer: str) -> Description:
        found: Description = self.metadata["formats"][self.metadata["layers"][layer]["weight"]]
        return found


def read_single_file(path: str | Path) -> SingleFile:
    """Read what :func:`export_single_file` wrote: the tensors are mapped, and each is checked against its SHA-256.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated, altered or foreign file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{path} is damaged: it claims a header of {length:,} bytes; copy it again")
        try:
            header = json.loads(file.read(length))
            metadata = {
                k: v if k in ("format", "layout") else json.loads(v) for k, v in header.pop("__metadata__").items()
            }
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is no file of this layout: its header cannot be read") from error
    if metadata.get("layout") != LAYOUT or metadata.get("layout_version") != LAYOUT_VERSION:
        raise ValueError(f"{path} is no file of layout {LAYOUT} {LAYOUT_VERSION}; write one with export_single_file")
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    try:
        tensors = {name: _tensor(name, place, data, metadata["sha256"][name]) for name, place in header.items()}
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged: its header does not describe its tensors ({error!r}); copy it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    missing = sorted(set(metadata["sha256"]) - set(tensors))
    if missing:
        raise ValueError(f"{path} lacks tensor {missing[0]} ({len(missing)} in all); copy it again")
    return SingleFile(tensors, metadata)


def _tensor(name: str, place: Mapping[str, Any], data: NDArray[np.uint8], sha256: str) -> NDArray[np.generic]:
    start, stop = place["data_offsets"]
    if not 0 <= start <= stop <= data.size:
        raise ValueError(f"tensor {name} lies outside of the file, which is truncated; copy it again")
    raw = data[start:stop]
    if hashlib.sha256(raw.data).hexdigest() != sha256:
        raise ValueError(f"tensor {name} was altered since it was saved: its SHA-256 differs; copy it again")
    try:
        x: NDArray[np.generic] = raw.view(_TYPES[place["dtype"]]).reshape(place["shape"])
    except ValueError:
        raise ValueError(f"tensor {name} does not have the shape {place['shape']}; copy it again") from None
    widen = _WIDENED.get(place["dtype"])
    return x if widen is None else widen(x)


def _from_bfloat16(x: NDArray[np.generic]) -> NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _from_e4m3(x: NDArray[np.generic]) -> NDArray[np.float32]:
    fmt = FloatFormat.parse("e4m3fn")
    values = np.array([fmt.level(code) * 2.0**-9 for code in range(256)], np.float32)  # 2^-9: its smallest subnormal
    values[[0x7F, 0xFF]] = np.nan
    found: NDArray[np.float32] = values[x]
    return found


def _from_e8m0(x: NDArray[np.generic]) -> NDArray[np.float32]:
    powers = np.ldexp(1.0, np.arange(256) - 127)
    powers[0xFF] = np.nan
    found: NDArray[np.float32] = powers.astype(np.float32)[x]
    return found


_WIDENED: dict[str, Callable[[NDArray[np.generic]], NDArray[np.float32]]] = {
    "BF16": _from_bfloat16, "F8_E4M3": _from_e4m3, "F8_E8M0": _from_e8m0,
}  # fmt: skip
"""Conversions to float32 of the types that NumPy lacks, by the name of the type in the file."""
