"""A quantized transformer as one file that runs without the model's Python class.

Two kinds, both ``.pt2``: a *program* is ``torch.export``'s archive of the lowered graph, a *package* is what AOTInductor
compiles it to. Batch, image size and text length stay dynamic. Weights are stored as plain tensors, packed codes and scales;
nothing is pickled.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fp4dit_ao import (
    _compat,
    block_linear,  # noqa: F401, these two register the operators that exported graphs call
    kernels,  # noqa: F401
    samples,
)
from fp4dit_ao.folders import whole_file

if TYPE_CHECKING:
    from fp4dit_ao.quantized_transformer import QuantizedTransformer

SUFFIX = ".pt2"
_NOTE = "fp4dit_ao.json"
"""In a program, the file beside the graph, in a package, the metadata entry that says how it is called."""


def export_program(model: "QuantizedTransformer") -> ExportedProgram:
    """``model``'s lowered graph as an exported program: same bits as the graph, run eagerly.

    Its operators are aten's and ``torch.ops.fp4dit_ao``'s, and its weights plain tensors: codes ``….weight_qdata`` (uint8) and
    scales ``….weight_scale``. It takes the keyword arguments that were captured, and returns a tuple.
    """
    from fp4dit_ao.passes.unwrap import unwrap  # needs torchao, which loading does not

    graph = unwrap(model.graph)
    kwargs = _example(model)
    shapes = pytree.tree_map(
        lambda x: dict.fromkeys(range(x.ndim), Dim.AUTO) if isinstance(x, Tensor) else None, kwargs
    )
    with torch.no_grad(), _compat.distinct_sizes():
        exported = torch.export.export(graph, (), kwargs, dynamic_shapes=shapes, strict=False)
    return _compat.without_guards(exported)


def save_program(model: "QuantizedTransformer", path: str | Path) -> None:
    """Write :func:`export_program` to ``path``, whole or not at all; a file that is there is replaced.

    Raises:
        ValueError: ``path`` does not end in ``.pt2``.
        OSError: it cannot be written.
    """
    with whole_file(_checked(path)) as partial:
        exported = export_program(model)
        exported.example_inputs = None  # the only part of an archive that would be pickled
        torch.export.save(exported, partial, extra_files={_NOTE: json.dumps(_note(model, exported))})


def save_package(model: "QuantizedTransformer", path: str | Path) -> None:
    """Compile ``model``'s graph ahead of time, for this machine's kind of processor or GPU, and write it to ``path``.

    It gives the same bits as ``torch.compile`` of the graph. Compiling takes as long as that, minutes for a large model.

    Raises:
        ValueError: ``path`` does not end in ``.pt2``.
        OSError: it cannot be written.
        RuntimeError: there is no C++ compiler.
    """
    with whole_file(_checked(path)) as partial:
        exported = export_program(model)
        options = {"aot_inductor.metadata": {_NOTE: json.dumps(_note(model, exported))}}
        with torch.no_grad(), _compat.distinct_sizes(), _compat.types_in_packages():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(partial), inductor_configs=options)


class ExportedTransformer:
    """A program or a package, called with the keyword arguments of the transformer that it was made from.

    Attributes:
        kind: ``"program"`` or ``"package"``.
        class_name: of the diffusers model that was quantized.
        description: of the arguments, as ``samples.describe`` has it; sizes that may vary have names.
        dtype: of its floating-point inputs and outputs.
    """

    def __init__(self, kind: str, run: Callable[..., Any], note: Mapping[str, Any]):
        self.kind = kind
        self.class_name = str(note["class_name"])
        self.description = note["inputs"]
        self.dtype: torch.dtype = getattr(torch, note["dtype"])
        self._run = run
        self._specs = samples.specs(self.description)
        whole = samples.decode(self.description, lambda spec: torch.empty(0))
        self._constants = {name: value for name, value in whole.items() if not any(samples.tensors(value))}
        self._tuple = {"return_dict": False} if "return_dict" in whole else {}

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        """What the transformer's ``forward`` returns with ``return_dict=False``.

        Constants that were captured (``None``, flags) may be left out.

        Raises:
            ValueError: an argument that the graph cannot honour: unknown, of another type or rank, on another kind of
                device, or of a size that was not captured.
        """
        arguments = self._constants | arguments | self._tuple
        who = f"exported {self.class_name}"
        samples.check(self.description, arguments, who)
        samples.check_tensors(self._specs, arguments, who)
        # a view's strides, such as those of one timestep expanded over the batch, are not what was compiled
        output: tuple[Tensor, ...] = self._run(**pytree.tree_map_only(Tensor, Tensor.contiguous, arguments))
        return output


def load(path: str | Path) -> ExportedTransformer:
    """What :func:`save_program` or :func:`save_package` wrote.

    A package holds compiled code, which runs: load only files that you trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it was not written here, or is damaged.
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
    note: dict[str, Any]
    try:
        if package:
            run = torch._inductor.aoti_load_package(str(path))
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


def _note(model: "QuantizedTransformer", exported: ExportedProgram) -> dict[str, Any]:
    return {
        "class_name": model.config["_class_name"],
        "inputs": _inputs(exported),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("fp4dit-ao", "torch")},
    }


def _inputs(exported: ExportedProgram) -> Any:
    """The keyword arguments of ``exported``, described as its graph has them; see ``samples.check_tensors``."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    _, arguments = pytree.tree_unflatten([values[name] for name in inputs], exported.call_spec.in_spec)

    def described(x: Tensor) -> dict[str, Any]:
        shape = [int(size) if size.isdigit() else size for size in map(str, x.shape)]
        return {"shape": shape, "dtype": str(x.dtype).removeprefix("torch."), "device": x.device.type}

    return samples.encode(arguments, described)


def _example(model: "QuantizedTransformer") -> dict[str, Any]:
    """Arguments of the sizes that the graph was captured with; those were chosen so that no size is taken for a constant."""
    kwargs = samples.empty_like(model.description, model.dtype)
    names = {id(x): name for name, x in _compat.flat_inputs(model.graph, kwargs).items()}
    sizes = _compat.captured_sizes(model.graph)
    return pytree.tree_map_only(
        Tensor, lambda x: torch.zeros(sizes[names[id(x)]], dtype=x.dtype, device=model.device), kwargs
    )
