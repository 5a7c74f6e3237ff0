"""Tensors of a saved transformer: safetensors files, sharded as diffusers does it, each tensor with a SHA-256.

Claimed sizes are compared with the file on disk before memory is allocated.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp4dit_ao.util.sentences import first_line

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
JSON_LIMIT = 64 << 20
"""Largest JSON file that is read, in bytes; a model with a hundred thousand tensors needs less."""
_SHARD = re.compile(r"[\w-]+\.safetensors")


@dataclass(frozen=True)
class Entry:
    """Type, shape and checksum that a stored tensor must have.

    Attributes:
        dtype: name of the type in torch, such as ``"uint8"``.
        shape: shape of the tensor.
        sha256: SHA-256 of its bytes, in row-major order, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @staticmethod
    def of(x: Tensor) -> "Entry":
        """Entry of ``x``, with its checksum."""
        return Entry(str(x.dtype).removeprefix("torch."), tuple(x.shape), checksum(x))

    @staticmethod
    def unchecked(x: Tensor) -> "Entry":
        """Entry of ``x`` without a checksum, for tensors that were never in a file."""
        return Entry(str(x.dtype).removeprefix("torch."), tuple(x.shape), "")

    @staticmethod
    def from_json(data: Any) -> "Entry":
        """Inverse of ``dataclasses.asdict``.

        Raises:
            ValueError: ``data`` describes no tensor.
        """
        dtype, shape, sha256 = data["dtype"], data["shape"], data["sha256"]
        fits = isinstance(getattr(torch, dtype, None), torch.dtype) and isinstance(sha256, str)
        if not fits or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise ValueError(f"{str(data)[:80]} describes no tensor")
        return Entry(dtype, tuple(shape), sha256)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count: int = getattr(torch, self.dtype).itemsize
        for size in self.shape:
            count *= size
        return count

    def check(self, name: str, x: Tensor) -> None:
        """Raises ``ValueError`` if ``x`` has another type, shape or checksum; ``name`` is for the message."""
        dtype = str(x.dtype).removeprefix("torch.")
        if dtype != self.dtype or tuple(x.shape) != self.shape:
            raise ValueError(
                f"tensor {name} is {tuple(x.shape)} of {dtype}, saved as {self.shape} of {self.dtype}; copy the folder again"
            )
        if checksum(x) != self.sha256:
            raise ValueError(
                f"tensor {name} was altered since it was saved: its SHA-256 differs; copy the folder again"
            )


def checksum(x: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row-major order."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def write(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str], max_shard_size: int | str) -> None:
    """Writes ``tensors`` into ``folder``: one file, or shards of at most ``max_shard_size`` bytes and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    whole = _apart({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(whole, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: whole[name] for name in names}, folder / file, metadata={"format": "pt", **metadata})
        sort_metadata(folder / file)
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, none of which shares a storage: a compiled graph's q, k and v are rows of one weight, with one set of
    codebooks, and safetensors takes no shared storages. Parts of one are storages of their own on its memory, equals copies."""
    users = Counter(x.untyped_storage().data_ptr() for x in tensors.values() if x.numel())
    starts = set[int]()
    found = {}
    for name, x in tensors.items():
        if x.numel() and users[x.untyped_storage().data_ptr()] > 1:
            own = x.clone() if x.data_ptr() in starts else _as_storage_of_its_own(x)
            starts.add(x.data_ptr())
            found[name] = own
        else:
            found[name] = x
    return found


def _as_storage_of_its_own(x: Tensor) -> Tensor:
    """A contiguous tensor on the same memory, of which it knows no more than its own part."""
    return torch.from_numpy(x.reshape(-1).view(torch.uint8).numpy()).view(x.dtype).reshape(x.shape)


def sort_metadata(path: Path) -> None:
    """Brings the texts in a safetensors file's header into order, in place: the library writes them in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) <= length:  # as long as what was there, which had spaces at its end
            file.seek(8)
            file.write(text.ljust(length))


def read(folder: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors in ``entries`` from ``folder``; each is checked before it is yielded.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or a tensor is truncated, altered, missing or left over; the message names it.
    """
    for file, names in _files(folder, entries).items():
        path = folder / file
        _check_size(path, names, entries)
        try:
            with safe_open(path, "pt") as opened:
                found = set(opened.keys())
                _same_names(path, found, names)
                for name in names:
                    # copied to memory with torch's alignment, on which the last bits of small matrix products depend
                    x = opened.get_tensor(name).clone()
                    try:
                        entries[name].check(name, x)
                        _check_scale(name, x, entries)
                    except ValueError as error:
                        raise ValueError(f"{path}: {error}") from None
                    yield name, x
        except ValueError:
            raise
        except Exception as error:  # errors of safetensors, and of torch about unknown types and shapes
            raise ValueError(f"{path} is damaged ({first_line(error)}); copy it again") from error


_SCALES = ("scale", "row_scale", "per_tensor_scale")
"""Parts of a quantized weight that multiply its codes."""


def _check_scale(name: str, x: Tensor, entries: Mapping[str, Entry]) -> None:
    """Raises ``ValueError`` for scales that no quantization gives, though their checksum is right."""
    weight, _, part = name.rpartition(".")
    if part not in _SCALES or f"{weight}.qdata" not in entries or not x.is_floating_point():
        return
    values = x.float()
    wrong = ~torch.isfinite(values) | ((values < 0) if x.dtype.itemsize == 1 else (values <= 0))
    if wrong.any():
        raise ValueError(
            f"tensor {name} holds a scale of {float(values[wrong][0]):g}; scales are positive and finite: "
            "quantize the model again"
        )


def _files(folder: Path, entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Names of tensors by file, from the index; all in one file if there is no index."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder / WEIGHTS} is missing; copy the whole folder again")
        return {WEIGHTS: list(entries)}
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) and _SHARD.fullmatch(p) for p in places.values()):
        raise ValueError(f"{path} is damaged: it maps no tensors to files beside it; copy it again")
    _same_names(path, set(places), list(entries))
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        files.setdefault(file, []).append(name)
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; copy the whole folder again")
    return files


def _check_size(path: Path, names: list[str], entries: Mapping[str, Entry]) -> None:
    """Raises ``ValueError`` if a file is not as long as its header plus its tensors, or claims an impossible header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > 4096 + sum(256 + 6 * len(name) for name in names):
        raise ValueError(f"{path} is damaged: it claims a header of {header:,} bytes; copy it again")
    expected = 8 + header + sum(entries[name].nbytes for name in names)
    if size != expected:
        state = "truncated" if size < expected else "altered since it was saved"
        raise ValueError(f"{path} is {state}: {size:,} of {expected:,} bytes; copy it again")


def _same_names(path: Path, found: set[str], names: list[str]) -> None:
    missing, unknown = sorted(set(names) - found), sorted(found - set(names))
    if missing:
        raise ValueError(f"{path} lacks tensor {missing[0]} ({len(missing)} in all); copy the whole folder again")
    if unknown:
        raise ValueError(
            f"{path} holds tensor {unknown[0]}, which config.json does not know; copy the whole folder again"
        )


def read_json(path: Path) -> object:
    """Content of a JSON file.

    Raises:
        ValueError: the file is too large, too deeply nested, or not JSON.
    """
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise ValueError(f"{path} is damaged: {size:,} bytes are more than such a file can have; copy it again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({first_line(error)}); copy it again") from error
