"""Export of a quantized transformer to one file that runs without the model's Python class.

There are two kinds, both ``.pt2``: a *program* is ``torch.export``'s archive of the lowered graph, a *package* is the
code that AOTInductor compiles from it. Batch, image size and text length stay dynamic. Weights are stored as plain
tensors, packed codes and scales; nothing is pickled.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fp4dit_ao import _compat, kernels  # noqa: F401, kernels registers the operators that exported graphs call
from fp4dit_ao._compat import pytree
from fp4dit_ao.deploy.signature import Signature, as_length, signature_of
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.passes.numbers_to_lengths import numbers_to_lengths
from fp4dit_ao.util.atomic_files import whole_file
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.versions import version_of

if TYPE_CHECKING:
    from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer

SUFFIX = ".pt2"
_NOTE = "fp4dit_ao.json"
"""Name of the JSON with the call signature: a file beside the graph in a program, a metadata entry in a package."""


class Note(TypedDict):
    """The call signature, as an archive holds it."""

    class_name: str
    signature: dict[str, Any]
    dtype: str
    versions: dict[str, str]


@plain_mode()
def export_program(model: "QuantizedTransformer", *, joined: bool = False) -> ExportedProgram:
    """Exports the lowered graph of ``model`` as a program, whose results equal those of the eager graph in every bit.

    Its operators are aten's and ``torch.ops.fp4dit_ao``'s, its weights are plain tensors: codes ``….weight_qdata``
    (uint8) and scales ``….weight_scale``. It takes the captured keyword arguments and returns a tuple.

    Args:
        model: on its device.
        joined: whether linears that read the same value become one product, with one weight; see ``passes.joined_linears``.
    """
    # these need torchao, which loading does not
    from fp4dit_ao.passes.joined_linears import join_linears
    from fp4dit_ao.passes.subclass_unwrapping import unwrap

    graph = unwrap(join_linears(model.graph) if joined else model.graph)
    kwargs = _example(model)
    numbers = _numbers(model)
    kwargs |= {name: as_length(kwargs[name]) for name in numbers}
    numbers_to_lengths(graph, numbers)
    shapes = pytree.tree_map(
        lambda x: dict.fromkeys(range(x.ndim), Dim.AUTO) if isinstance(x, Tensor) else None, kwargs
    )
    with torch.no_grad(), _compat.distinct_sizes():
        exported = torch.export.export(graph, (), kwargs, dynamic_shapes=shapes, strict=False)
    return _compat.without_guards(exported)


def save_program(model: "QuantizedTransformer", path: str | Path) -> None:
    """Writes :func:`export_program` to ``path``, whole or not at all; an existing file is replaced.

    Raises:
        ValueError: ``path`` does not end in ``.pt2``.
        OSError: the file cannot be written.
    """
    with whole_file(_checked(path)) as partial:
        exported = export_program(model)
        exported.example_inputs = None  # example inputs are the only part of an archive that would be pickled
        torch.export.save(exported, partial, extra_files={_NOTE: json.dumps(_note(model, exported))})


def save_package(model: "QuantizedTransformer", path: str | Path) -> None:
    """Compiles the graph of ``model`` ahead of time, for this machine's kind of processor or GPU, and writes it to
    ``path``.

    Results equal those of ``torch.compile`` in every bit. Compiling takes as long, minutes for a large model.

    Raises:
        ValueError: ``path`` does not end in ``.pt2``.
        OSError: the file cannot be written.
        RuntimeError: there is no C++ compiler.
    """
    with whole_file(_checked(path)) as partial:
        exported = export_program(model, joined=True)
        options = {"aot_inductor.metadata": {_NOTE: json.dumps(_note(model, exported))}}
        with torch.no_grad(), _compat.distinct_sizes(), _compat.types_in_packages():
            _compat.compile_package(exported, partial, options)


class ExportedTransformer:
    """A loaded program or package, called with the keyword arguments of the transformer that it was made from.

    Attributes:
        kind: ``"program"`` or ``"package"``.
        class_name: class of the diffusers model that was quantized.
        signature: types, devices and sizes of its arguments.
        dtype: type of its floating-point inputs and outputs.
    """

    def __init__(self, kind: str, run: Callable[..., tuple[Tensor, ...]], note: Note):
        self.kind = kind
        self.class_name = str(note["class_name"])
        self.signature = Signature(**note["signature"])
        self.dtype: torch.dtype = getattr(torch, note["dtype"])
        self._run = run

    @torch.no_grad()
    def __call__(self, **arguments: object) -> tuple[Tensor, ...]:
        """Runs the graph; returns what the transformer's ``forward`` returns with ``return_dict=False``.

        Captured constants (``None``, flags) may be left out.

        Raises:
            ValueError: an argument does not fit the signature; see ``Signature.bind``.
        """
        return self._run(**self.signature.bind(arguments, f"exported {self.class_name}"))


def load(path: str | Path) -> ExportedTransformer:
    """Loads a file that :func:`save_program` or :func:`save_package` wrote.

    A package holds compiled code, which is executed: load only files that you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by this package, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .pt2 archive, or cut short: {error}") from error
    package = any("/data/aotinductor/" in name for name in names)
    note: Note
    try:
        if package:
            run = _compat.load_package(path)
            note = json.loads(run.get_metadata()[_NOTE])
            return ExportedTransformer("package", run, note)
        extra = {_NOTE: ""}
        exported = torch.export.load(path, extra_files=extra)
        note = json.loads(extra[_NOTE])
        return ExportedTransformer("program", exported.module(), note)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} was not written by this version's fp4dit-ao export, or is damaged; export it again"
        ) from error


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"cannot export to {path.name}: the name must end in {SUFFIX}")
    return path


def _note(model: "QuantizedTransformer", exported: ExportedProgram) -> Note:
    return {
        "class_name": model.config["_class_name"],
        "signature": asdict(signature_of(exported, _numbers(model))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version_of(name) for name in ("fp4dit-ao", "torch")},
    }


def _numbers(model: "QuantizedTransformer") -> list[str]:
    """Names of whole-number arguments that may differ from the captured ones."""
    return sorted(_compat.varying_numbers(model.graph) & set(_compat.input_names(model.graph)))


def _example(model: "QuantizedTransformer") -> dict[str, Any]:
    """Arguments of the captured sizes, which were chosen so that export takes none of them for a constant."""
    kwargs = sample_description.empty_like(model.description, model.dtype)
    names = {id(x): name for name, x in _compat.flat_inputs(model.graph, kwargs).items()}
    sizes = _compat.captured_sizes(model.graph)
    return pytree.tree_map_only(
        Tensor, lambda x: torch.zeros(sizes[names[id(x)]], dtype=x.dtype, device=model.device), kwargs
    )
