"""What reconstruction did: a row per block."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BlockReport:
    """One block.

    Attributes:
        block: fully qualified name.
        layers: quantized linears in it.
        loss_before: squared error of its output with round-to-nearest, relative to the output's power, on quantized inputs.
        loss_after: the same with the rounding that was kept.
        changed: fraction of its weights whose code differs from round-to-nearest.
        kept: ``"learned"``, or ``"nearest"`` where learning did not improve the error on all calibration rows.
        seconds: spent on it.
    """

    block: str
    layers: int
    loss_before: float
    loss_after: float
    changed: float
    kept: str
    seconds: float


@dataclass
class ReconstructionReport:
    """Rows in the order of the graph.

    Attributes:
        rows: one for each block.
        seconds: in total.
        stream_bytes: the most memory that the two streams of block inputs and outputs took.
    """

    rows: list[BlockReport]
    seconds: float
    stream_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table, and the totals under it."""
        lines = [
            "| block | linears | loss before | loss after | changed | kept | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            lines.append(
                f"| {row.block} | {row.layers} | {row.loss_before:.3e} | {row.loss_after:.3e} | {row.changed:.1%} "
                f"| {row.kept} | {row.seconds:.1f} |"
            )
        lines += [
            "",
            f"{self.seconds:.1f} s; block inputs and outputs took at most {self.stream_bytes / 2**20:.1f} MiB.",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()
