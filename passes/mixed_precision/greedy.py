"""Greedy allocation: bits go where they lower the error most."""

from collections.abc import Sequence

from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, Choice, LayerChoices, check_budget


def greedy(layers: Sequence[LayerChoices], budget_bits: float | None) -> dict[str, str]:
    """Starts every layer at its smallest format, and widens, one at a time, the layer that gains most per stored bit.

    A step that does not fit into what is left of the budget is passed over, and the next best one is taken. Without a budget
    every layer ends at its least error.

    Raises:
        ValueError: the budget is below what the smallest formats take.
    """
    check_budget(layers, budget_bits)
    taken = [min(layer.choices, key=lambda choice: (choice.bits, choice.error)) for layer in layers]
    left = float("inf")
    if budget_bits is not None:
        left = sum(layer.weights * (budget_bits - now.bits) for layer, now in zip(layers, taken, strict=True))
    while True:
        best: tuple[float, int, Choice] | None = None
        for index, (layer, now) in enumerate(zip(layers, taken, strict=True)):
            for choice in layer.choices:
                gain, cost = now.error - choice.error, layer.weights * (choice.bits - now.bits)
                if gain > 0 and cost <= left * (1 + 1e-9):
                    rate = gain / cost if cost > 0 else float("inf")
                    if best is None or rate > best[0]:
                        best = rate, index, choice
        if best is None:
            return {layer.name: choice.fmt for layer, choice in zip(layers, taken, strict=True)}
        _, index, choice = best
        left -= layers[index].weights * (choice.bits - taken[index].bits)
        taken[index] = choice


ALLOCATIONS.register(
    "greedy", greedy, summary="Widens the layer that gains most per stored bit until the budget is spent.",
    cost="a Gram matrix for each linear",
)  # fmt: skip
