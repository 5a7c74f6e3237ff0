"""The table of seconds per iteration on a block."""

from pathlib import Path

import pytest

from benchmarks import block_iterations


def test_it_prints_a_line_for_each_kind_of_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    block_iterations.main(models="flux", rows="1", iters="1,2", tiny=True, out=out)
    assert out.read_text() in capsys.readouterr().out
    head, _, *lines = [line for line in out.read_text().splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")][1:4] == ["model", "block", "million weights"]
    cells = [[cell.strip() for cell in line.split("|")][1:-1] for line in lines]
    # two streams: each has q, k, v and output, a feed-forward four times as wide, and modulation by six vectors; one: by three
    width = 128
    assert [(row[1], float(row[2])) for row in cells] == [
        ("transformer_blocks.0", pytest.approx(36 * width**2 / 1e6, rel=0.01)),
        ("single_transformer_blocks.0", pytest.approx(15 * width**2 / 1e6, rel=0.01)),
    ]
