"""Call signature of an exported graph: types, devices, and sizes that fit each other.

Compiled code checks none of this: given a mask of another batch size, for example, it reads past its end and still
returns an image.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.deploy import size_expressions
from fp4dit_ao.graph_capture import sample_description


class ArgumentSpec(TypedDict):
    """One tensor of a signature; a size that may vary is a name."""

    shape: list[int | str]
    dtype: str
    device: str


@dataclass(frozen=True)
class Signature:
    """Keyword arguments of a graph, in a form that JSON can hold.

    Attributes:
        inputs: description of the tensors and constants by ``sample_description.encode``, with each tensor's
            ``device``. A size that may vary is a name instead of a number; a name stands for the same number wherever
            it occurs.
        numbers: sizes, in the same form, by the name of the argument that passes them as a whole number.
        relations: equalities between names that every call must fulfil, in the syntax of ``size_expressions.evaluate``.
    """

    inputs: sample_description.Description
    numbers: Mapping[str, int | str]
    relations: Sequence[str]

    def bind(self, arguments: Mapping[str, object], who: str) -> dict[str, object]:
        """Arguments of the graph for a call: adds omitted constants, and turns whole numbers into lengths of tensors.

        Args:
            arguments: keyword arguments of the call.
            who: the beginning of the message.

        Raises:
            ValueError: an argument is unknown, is not a whole number, differs from the captured type, rank, kind of
                device or fixed size, or does not fit another argument.
        """
        given = {name: value for name, value in arguments.items() if name not in self.numbers}
        fixed = {"return_dict": False} if "return_dict" in self._constants else {}
        bound = self._constants | given | fixed
        numbers: dict[str, int] = {}
        for name in self.numbers:
            value = arguments.get(name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{who}: {name} must be a whole number, found {value!r}")
            numbers[name] = value
        sample_description.check(self.inputs, bound, who)
        self._check_types(bound, who)
        self._check_sizes(bound, numbers, who)
        # compiled code assumes contiguous inputs; one timestep expanded over the batch is not
        bound = pytree.tree_map_only(Tensor, Tensor.contiguous, bound)
        return bound | {name: as_length(value) for name, value in numbers.items()}

    @functools.cached_property
    def _constants(self) -> dict[str, object]:
        whole = sample_description.decode_arguments(self.inputs, lambda spec: torch.empty(0))
        return {name: value for name, value in whole.items() if not any(sample_description.tensors(value))}

    @functools.cached_property
    def _specs(self) -> dict[str, ArgumentSpec]:
        return sample_description.specs(self.inputs)

    def _check_types(self, arguments: Mapping[str, object], who: str) -> None:
        for name, x in sample_description.tensors(arguments):
            dtype, device = getattr(torch, self._specs[name]["dtype"]), self._specs[name]["device"]
            if x.dtype != dtype:
                raise ValueError(f"{who}: {name} is {x.dtype}, it was captured as {dtype}; pass {name}.to({dtype})")
            if x.device.type != device:
                raise ValueError(
                    f"{who}: {name} is on {x.device}, it was captured on {device}; pass {name}.to({device!r})"
                )

    def _check_sizes(self, arguments: Mapping[str, object], numbers: Mapping[str, int], who: str) -> None:
        shapes = {name: tuple(x.shape) for name, x in sample_description.tensors(arguments)}
        found = [(name, name, self.numbers[name], number) for name, number in numbers.items()]
        for name, shape in shapes.items():
            wanted = enumerate(self._specs[name]["shape"])
            found += [(name, f"{name}.shape[{i}]", size, shape[i]) for i, size in wanted]
        values: dict[str, int] = {}
        first: dict[str, tuple[str, str]] = {}  # by name of a size: the first argument that has it, and the place there
        for name, place, wanted_size, size in found:
            if isinstance(wanted_size, int):
                if size != wanted_size:
                    raise ValueError(
                        f"{who}: {place} is {size}, it was captured as {wanted_size}, which is fixed; pass what the model "
                        "that was exported takes"
                    )
                continue
            _, other = first.setdefault(wanted_size, (name, place))
            if values.setdefault(wanted_size, size) != size:
                raise ValueError(
                    f"{who}: {place} is {size}, it must be {values[wanted_size]}, as {other} is; pass what belongs together"
                )
        broken = next((relation for relation in self.relations if not _holds(relation, values)), None)
        if broken is not None:
            names = size_expressions.names(broken)
            said = size_expressions.rename(broken, {name: first[name][1] for name in names})
            given: dict[str, object] = {**shapes, **numbers}
            involved = " and ".join(f"{name} {given[name]}" for name in dict.fromkeys(first[name][0] for name in names))
            raise ValueError(f"{who}: {involved} do not fit: {said} must hold; pass what belongs together")


def _holds(relation: str, values: Mapping[str, int]) -> bool:
    try:
        return bool(size_expressions.evaluate(relation, values))
    except ZeroDivisionError:  # an empty batch
        return False


def as_length(number: int) -> Tensor:
    """Tensor of shape ``(number, 0)`` that stands for a whole number: compiled code takes sizes from tensors only."""
    return torch.empty(number, 0)


def signature_of(exported: ExportedProgram, numbers: Sequence[str]) -> Signature:
    """Call signature of an exported program.

    Args:
        exported: a program that is not serialized yet.
        numbers: names of arguments that stand for whole numbers; see :func:`as_length`.
    """
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    _, arguments = pytree.tree_unflatten([values[name] for name in inputs], exported.call_spec.in_spec)
    relations = _compat.size_relations(exported)
    known: set[str] = set()

    def named(size: int | torch.SymInt) -> int | str:
        text = _compat.size_text(size)
        if text.isdigit():
            return int(text)
        name = text if text.isidentifier() else f"derived{len(relations)}"
        if name != text:
            relations.append(f"{name} == {text}")
        known.add(name)
        return name

    def described(x: Tensor) -> ArgumentSpec:
        shape = [named(size) for size in x.shape]
        return {"shape": shape, "dtype": str(x.dtype).removeprefix("torch."), "device": x.device.type}

    lengths = {name: named(arguments.pop(name).shape[0]) for name in numbers}
    inputs_described = sample_description.encode(arguments, described)
    checkable = [
        relation
        for relation in relations
        if size_expressions.readable(relation) and known.issuperset(size_expressions.names(relation))
    ]
    return Signature(inputs_described, lengths, checkable)
