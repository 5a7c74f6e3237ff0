"""Speed and size of all quantized linears together on one machine: packed, in bfloat16, and each in the form that is faster."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fp4dit_ao.evaluation.layer_speed import better_in_bfloat16
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.util.markdown import markdown_table


@dataclass(frozen=True)
class MeasuredLinear:
    """One quantized linear.

    Attributes:
        name: of its module.
        speed: against bfloat16.
        bytes: of the weight as it is stored.
        elements: of the weight.
    """

    name: str
    speed: LayerSpeed
    bytes: int
    elements: int


@dataclass(frozen=True)
class Form:
    """All linears of a model, held in some form: seconds of one call, and bytes of the weights."""

    seconds: float
    bytes: float


class Certificate:
    """The linears of one model on one machine.

    Args:
        layers: every quantized linear.
        command: draws with the form that the rule picks (``weights="auto"``), for :meth:`sentence`.

    Attributes:
        slow: names of linears that are slower than bfloat16, which the rule holds in it.
        disturbed: number of linears that a busy machine was measured with; nothing follows from a certificate with such.
    """

    def __init__(self, layers: Sequence[MeasuredLinear], command: str):
        self.layers, self.command = list(layers), command
        self.disturbed = sum(not layer.speed.steady for layer in layers)
        self.slow = set(better_in_bfloat16({layer.name: layer.speed for layer in layers}, torch.bfloat16))

    def held(self, in_bfloat16: Collection[str] = ()) -> Form:
        """The linears named ``in_bfloat16`` in that type, all others packed."""
        seconds = sum(x.speed.bfloat16 if x.name in in_bfloat16 else x.speed.seconds for x in self.layers)
        return Form(seconds, sum(2 * x.elements if x.name in in_bfloat16 else x.bytes for x in self.layers))

    @property
    def bfloat16(self) -> Form:
        """All linears in bfloat16."""
        return self.held({layer.name for layer in self.layers})

    @property
    def picked(self) -> Form:
        """Each linear in the form that the rule picks."""
        return self.held(self.slow)

    def table(self) -> str:
        """One row for each form."""
        forms = {"bfloat16": self.bfloat16, "packed": self.held()}
        if not self.disturbed:
            forms[f"`--weights auto`: {len(self.slow)} of {len(self.layers)} in bfloat16, none slower than it"] = (
                self.picked
            )
        rows = [
            [
                title,
                f"{form.seconds * 1e3:.3g}",
                f"{self.bfloat16.seconds / form.seconds:.2f}",
                f"{form.bytes / 1e6:.2f}",
            ]
            for title, form in forms.items()
        ]
        return markdown_table(["all quantized linears", "ms a call", "speed / bfloat16", "MB"], rows)

    def sentence(self) -> str:
        """How much faster and smaller they are, and what to do where some are not faster."""
        if self.disturbed:
            return (
                f"Other work disturbed the measuring of {self.disturbed} of {len(self.layers)} quantized linears, so this says "
                "nothing yet: run it again when the machine is idle."
            )
        whole, packed, picked = self.bfloat16, self.held(), self.picked
        smaller = f"{packed.bytes / whole.bytes:.0%} of the bytes"
        if not self.slow:
            return (
                f"Every quantized linear is at least as fast as bfloat16 here: together {whole.seconds / packed.seconds:.2f} "
                f"times as fast, in {smaller}."
            )
        if len(self.slow) == len(self.layers):
            return (
                f"No linear of this model is faster than bfloat16 on this machine, so run it in bfloat16: {self.command}. "
                f"Packed, the linears take {smaller}, and {packed.seconds / whole.seconds:.2f} times as long."
            )
        return (
            f"{len(self.slow)} of {len(self.layers)} quantized linears are slower than bfloat16 here. With these in bfloat16, "
            f"all together are {whole.seconds / picked.seconds:.2f} times as fast, in {picked.bytes / whole.bytes:.0%} of the "
            f"bytes: {self.command}."
        )
