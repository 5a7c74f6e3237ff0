"""``GraphTransform``: a change of a captured graph before quantization that leaves the function it computes as it was."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

APPLIED = "fp4dit_ao_transforms"
"""Key of ``graph.meta``: the records of the transforms that were applied to a graph, in order."""

Record = dict[str, Any]
"""JSON of what a transform did, with keys of its own."""


class GraphTransform(abc.ABC):
    """A plug-in point: smoothing, splitting, rotating, … of a captured graph, before ``prepare_pt2e``.

    **Order of calls.** ``fit(graph, samples)``, then ``apply(graph)`` on the same graph; or ``from_record(record)``, then
    ``apply(graph)`` on a fresh capture of the same model, whose tensors may be fake, or ``apply_to_modules(model)`` on the
    model itself, whose tensors may be on the meta device. Several transforms are each fitted to the graph that the previous one
    left, and are replayed in the same order.

    **What may change.** Nodes may be inserted, replaced and removed; values of parameters may change; parameters and buffers
    may be added, with names beside the parameters that they belong to (``blocks.0.attn.to_q.smooth_scale``).

    **What must not.** The graph computes the function that it computed before, up to rounding in the type of its tensors. Its
    inputs, outputs and signature stay. A parameter that stays keeps its name and shape. ``nn_module_stack`` of a new node
    is that of the node that it serves, so that it lies in the same transformer block. Parameters are shared with the model that
    was captured: they are replaced, never written into.

    **Records.** ``to_record`` holds what determines the structure of the changed graph (names and sizes), and is small.
    Learned tensors are parameters and buffers of the graph, and are saved with all others. A transform from a record
    changes the structure alone: parameters keep their values, and new tensors hold values that leave the function as it is
    (a scale of ones). The stored tensors take their places afterwards.

    **Idempotence.** ``apply`` on a graph that already has this transform, by its record, does nothing.

    A subclass implements :meth:`fit`, :meth:`rewrite`, :meth:`apply_to_modules`, :meth:`to_record` and :meth:`from_record`; the
    other methods where their defaults are wrong. It is registered in ``passes.transforms.registry.TRANSFORMS``. Its constructor
    can be called without arguments.

    Attributes:
        name: name in the registry.
        needs_data: whether :meth:`fit` looks at samples; if not, they may be empty.
        fits_single_file: whether ``export_single_file`` can say what was done to linears; False refuses such models there.
        quantizer: annotates what will be quantized, and with which observers; ``fp4dit_ao.transform`` sets it where it is None.
        progress: show a progress bar while fitting.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool]
    fits_single_file: ClassVar[bool] = True
    quantizer: Quantizer | None = None
    progress: bool = False

    @abc.abstractmethod
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Learn what to do with ``graph``, which is not changed.

        Args:
            graph: as ``capture`` or the transform before left it.
            samples: keyword arguments of ``forward``, one mapping a call.

        Raises:
            ValueError: no samples where they are needed, or samples that do not fit.
        """

    @abc.abstractmethod
    def rewrite(self, graph: GraphModule) -> None:
        """Change ``graph`` in place: what :meth:`apply` does where it has not been done.

        Raises:
            ValueError: the graph lacks a layer that the transform was fitted to.
        """

    @abc.abstractmethod
    def apply_to_modules(self, model: nn.Module) -> None:
        """Change the modules of ``model`` in place, as :meth:`rewrite` does the graph, so that tensors have the same names.

        Raises:
            ValueError: the model lacks a layer that the transform was fitted to.
        """

    @property
    def changes(self) -> bool:
        """Whether there is anything to change, as far as is known after fitting."""
        return True

    def shared_tensors(self) -> dict[str, str]:
        """Names of tensors that changed modules have and the graph has not, each with the name of the one that it equals.

        They are not saved; whoever fills the modules puts the other one in their places.
        """
        return {}

    def input_scales(self) -> dict[str, str]:
        """By the name of each linear whose input is multiplied, channel by channel: the name of the tensor of factors."""
        return {}

    def refused_loras(self) -> dict[str, str]:
        """By the name of each linear where a LoRA of the float model would be wrong: why (a clause), and the remedy."""
        return {}

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        """What a float weight became, for comparison with what it was quantized to; None if that is not known any more.

        Args:
            name: fully qualified name of the parameter.
            weight: the float model's, or what an earlier transform made of it.
            graph: with this transform and the learned tensors.
        """
        return weight

    @abc.abstractmethod
    def to_record(self) -> Record:
        """JSON data that :meth:`from_record` reads."""

    @classmethod
    @abc.abstractmethod
    def from_record(cls, record: Record) -> Self:
        """The transform that was applied; it changes structure alone.

        Raises:
            ValueError, LookupError, TypeError: it is no such record.
        """

    def apply(self, graph: GraphModule) -> None:
        """Change ``graph`` in place, and note it in ``graph.meta``; nothing, if it was done before.

        Raises:
            ValueError: the graph lacks a layer that the transform was fitted to.
        """
        record = {"name": self.name, **self.to_record()}
        done = records_of(graph)
        if record in done or not self.changes:
            return
        self.rewrite(graph)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        graph.meta[APPLIED] = [*done, record]


def records_of(graph: GraphModule) -> list[Record]:
    """The records of the transforms that were applied to ``graph``, in order; each has its transform's name as ``"name"``."""
    return list(graph.meta.get(APPLIED, []))
