"""Plans: a recipe and the methods that bring most with it, for a number of bits and a time, by name."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A recipe of formats with methods that go together.

    Attributes:
        recipe: a name in ``config.RECIPES``.
        rounding: name of the rounding rule.
        transforms: names of graph transforms, with options if wanted, in order.
        fine_tuning: name of the method of fine-tuning after rounding; None for none.
    """

    recipe: str
    rounding: str = "nearest"
    transforms: tuple[str, ...] = ()
    fine_tuning: str | None = None

    def check_alone(self, name: str, given: Mapping[str, object]) -> None:
        """Refuses methods given beside a plan, which would have to be taken or ignored without a word.

        Args:
            name: of this plan.
            given: arguments by name; what is None, False or empty was not given.

        Raises:
            ValueError: one was given.
        """
        if found := next((argument for argument, value in given.items() if value), None):
            raise ValueError(
                f"recipe {name!r} brings its own methods ({self.sentence()}); leave out {found}, or give it with recipe "
                f"{self.recipe!r}"
            )

    def sentence(self) -> str:
        """Recipe and methods, separated by commas."""
        parts = [self.recipe, *self.transforms, f"rounding {self.rounding}"]
        return ", ".join([*parts, f"fine-tuning {self.fine_tuning}"] if self.fine_tuning else parts)


_QUICK = Plan("w4a8_codebook")
_FOUR = Plan("w4a8_codebook", "gptq")
_FIVE = Plan("w4a8_codebook", "gptq", ("low_rank:rank=8",))
_EIGHT = Plan("w4a6_codebook", "gptq", ("smoothquant", "low_rank"))
_BEST = {
    (4, 1): _QUICK, (4, 10): _FOUR, (4, 60): _FOUR,
    (5, 1): _QUICK, (5, 10): _FIVE, (5, 60): _FIVE,
    (8, 1): _QUICK, (8, 10): _EIGHT, (8, 60): _EIGHT,
}  # fmt: skip
"""Plans by bits of a weight, and minutes to quantize the reference pipeline."""


def best(bits: int = 4, minutes: int = 10) -> Plan:
    """The plan of the highest PSNR on the reference pipeline, as ``python -m benchmarks.methods`` measures it.

    Args:
        bits: of a weight, about: 4 (up to 4.3), 5 (5.3) or 8 (8.5), scales and branches included.
        minutes: 1, 10 or 60, for the reference pipeline on two cores; a larger model takes longer in proportion.

    Raises:
        ValueError: other numbers.
    """
    if (bits, minutes) not in _BEST:
        known = "; ".join(f"{b} bits in {m} minutes" for b, m in _BEST)
        raise ValueError(f"no plan for {bits} bits in {minutes} minutes; there are plans for {known}")
    return _BEST[bits, minutes]


PLANS = {"best": best()} | {f"best_{bits}bit_{minutes}min": plan for (bits, minutes), plan in _BEST.items()}
"""Plans by the names that ``quantize_pipeline`` and the command line take in place of a recipe's."""
