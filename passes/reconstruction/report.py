"""Report of reconstruction: a row per unit (block, layer or window)."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class BlockReport:
    """One unit.

    Attributes:
        block: fully qualified name of the block or linear; of a window, that of its first and last block.
        layers: quantized linears in it.
        loss_before: the objective (of "mse": squared error relative to the output's power) on quantized inputs, with the
            rounding before: to nearest, or what an earlier window settled.
        loss_after: the same with the rounding that was kept.
        changed: fraction of its weights whose level differs from that of round-to-nearest.
        kept: ``"learned"`` or ``"solved"`` (closed form); or, where that did not improve the error on all calibration rows,
            ``"nearest"``, or ``"earlier"`` if an earlier window had settled some of the weights.
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
        rows: one for each unit.
        seconds: in total.
        stream_bytes: the most memory that the two streams of block inputs and outputs took.
    """

    rows: list[BlockReport]
    seconds: float
    stream_bytes: int

    def to_dict(self) -> dict[str, object]:
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
