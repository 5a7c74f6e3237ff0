"""The load test: its arithmetic on made-up turns, and a tiny run of two real servers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serving
from tests.tiny import tiny_pipeline


def turn(seconds: float, latencies: list[float], images: str, batches: dict[str, int]) -> dict[str, Any]:
    return {"seconds": seconds, "latencies": latencies, "images": list(images), "batches": batches}


MADE_UP: serving.Results = {
    "unquantized": {
        1: [turn(4.0, [1, 1, 1, 1], "abcd", {"1": 4, "2": 0}), turn(8.0, [2, 2, 2, 2], "efgh", {"1": 4, "2": 0})],
        8: [turn(2.0, [2, 2, 2, 2], "abcd", {"1": 0, "4": 1}), turn(2.0, [2, 2, 2, 2], "efgx", {"1": 0, "4": 1})],
    },
    "w4a6": {
        1: [turn(2.0, [0.5, 0.5, 0.5, 0.5], "ABCD", {"1": 4}), turn(2.0, [0.4, 0.5, 0.6, 0.9], "EFGH", {"1": 4})],
        8: [turn(1.0, [1, 1, 1, 1], "ABCD", {"2": 2}), turn(1.0, [1, 1, 1, 1], "EFGH", {"1": 1, "4": 1})],
    },
}


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_compares_round_by_round() -> None:
    text = serving.table(MADE_UP)
    head, _, *rows = cells(text)
    found = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
    assert list(found) == [("1", "unquantized"), ("1", "w4a6"), ("8", "unquantized"), ("8", "w4a6")]
    ours = found["1", "w4a6"]
    assert ours["images / s"] == "2.00"
    assert ours["of the unquantized"] == "3.00 (2.00 to 4.00)"  # not 12 s against 4 s, nor the best against the best
    assert found["8", "w4a6"]["images / batch"] == "2.0 (at most 4)"
    assert found["8", "unquantized"]["images / batch"] == "4.0 (at most 4)"
    latencies = [x for each in MADE_UP["w4a6"][1] for x in each["latencies"]]
    for percent in serving.PERCENTILES:
        assert ours[f"p{percent}, ms"] == f"{1000 * np.percentile(latencies, percent):.0f}"
    assert text.endswith("whatever the number of clients: unquantized 7 of 8, w4a6 8 of 8.")


@pytest.mark.timeout(400)
def test_a_tiny_load_is_measured(tiny_quantized: Any, tmp_path: Path) -> None:
    tiny_quantized.save_pretrained(tmp_path / "quantized")
    pipe = tiny_pipeline(layers=1)
    pipe.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "generation.json").write_text((tmp_path / "quantized" / "generation.json").read_text())
    servers = {"unquantized": str(tmp_path / "float"), "w4a6": str(tmp_path / "quantized")}
    options = ["--device", "cpu", "--max-batch", "2", "--no-compile", "--window", "200"]
    results = serving.measure(servers, options, [1, 3], 6, 3, 1, ["a red cat", "a blue dog", "a tree"], seconds=0)
    json.dumps(results)
    for by_number in results.values():
        for number, turns in by_number.items():
            (only,) = turns  # no time for a second round
            assert len(only["latencies"]) == len(only["images"]) == 6
            assert 0 < max(only["latencies"]) <= only["seconds"]
            assert set(only["batches"]) >= {"1", "2", "4", "8"}
            drawn = {int(size): count for size, count in only["batches"].items() if count}
            assert sum(size * count for size, count in drawn.items()) == 6
            assert (max(drawn) == 1) == (number == 1)
    assert len(cells(serving.table(results))) == 6


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)did not start:.*is no pipeline"), serving.server(str(tmp_path)):
        pass
