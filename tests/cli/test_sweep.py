"""A sweep: rows of a table become commands, what is finished is kept; on a cluster, in on_ray.py."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp4dit_ao.cli.app import check_command
from fp4dit_ao.cli.sweep import Outcome, execute, markdown, read_rows, sweep
from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity
from tests.ray_cluster import run_apart

pytestmark = pytest.mark.timeout(500)


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def pretend(arguments: list[str]) -> int:
    """In place of ``fp4dit-ao``: writes its target, or does what the model is called."""
    folder = Path(arguments[arguments.index("--out") + 1])
    print("ran", *arguments)
    if arguments[1] == "fails":
        return 1
    if arguments[1] == "raises":
        raise KeyError("a bug")
    if arguments[1] == "dies" and not (marker := folder.with_suffix(".died")).exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir()
    (folder / "model").write_text(str(os.getpid()))
    return 0


def accepted(arguments: list[str]) -> None:
    pass


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_becomes_commands(tmp_path: Path) -> None:
    options = {
        "group_size": 64,
        "transform": ["hadamard", "low_rank"],
        "seed": None,
        "evaluate": {"count": 8, "report": False},
    }
    (row,) = read_rows(write(tmp_path / "t.json", [{"name": "a", "model": "reference"} | options]), tmp_path)
    quantize, evaluate = row.steps
    assert quantize.target == tmp_path / "a"
    assert quantize.arguments == [
        "quantize", "reference", "--out", str(tmp_path / "a"), "--resume", "--group-size", "64",
        "--transform", "hadamard", "--transform", "low_rank",
    ]  # fmt: skip
    assert evaluate.target == tmp_path / "a.json"
    assert evaluate.arguments == [
        "evaluate", str(tmp_path / "a"), "--against", "reference", "--out", str(tmp_path / "a.json"),
        "--images", str(tmp_path / "images"), "--count", "8", "--no-report",
    ]  # fmt: skip
    for step in row.steps:
        check_command(step.arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ({"name": "a"}, "is no list of rows such as"),
        ([{"name": "a"}], "is no list of rows such as"),
        ([{"name": "a", "model": "m"}] * 2, "rows named \\['a', 'a'\\]"),
        ([{"name": "../a", "model": "m"}], "rows named"),
        ([{"name": "a", "model": "m", "roundings": "gptq"}], "row 'a': No such option: --roundings"),
        ([{"name": "a", "model": "m", "iters": "many"}], "row 'a': Invalid value for '--iters'"),
    ],
)
def test_wrong_tables_are_refused_before_anything_runs(rows: Any, message: str, tmp_path: Path) -> None:
    table = write(tmp_path / "t.json", rows)
    with pytest.raises(ValueError, match=message):
        sweep(table, tmp_path / "out", cpus=1, gpus=0, address=None, check=check_command, run=pretend)
    assert not (tmp_path / "out").exists()


def test_steps_end_at_a_failure_and_are_not_repeated(tmp_path: Path) -> None:
    rows = [{"name": name, "model": name, "evaluate": {}} for name in ("fails", "raises")]
    for row in read_rows(write(tmp_path / "t.json", rows), tmp_path):
        log = tmp_path / f"{row.name}.log"
        assert not execute(row, log, pretend).done
        assert log.read_text().count("ran quantize") == 1
        assert "ran evaluate" not in log.read_text()
    assert "KeyError: 'a bug'" in (tmp_path / "raises.log").read_text()
    (row,) = read_rows(write(tmp_path / "t.json", [{"name": "well", "model": "m"}]), tmp_path)
    for _ in range(2):
        assert execute(row, tmp_path / "well.log", pretend).done
    assert (tmp_path / "well.log").read_text().count("ran quantize") == 1


def test_rows_that_were_measured_alike_share_a_table(tmp_path: Path) -> None:
    psnr = np.array([[30.0, 31.0]])
    for name, machine, model in (("a", "one", "x"), ("b", "one", "y"), ("c", "another", "z")):
        where = {"processor": machine, "gpu": "none", "threads": "1", "torch": "2", "torchao": "0", "diffusers": "0"}
        rows = [Fidelity(row, psnr, psnr / 40, scores={"LPIPS": psnr}) for row in ("original", name)]
        Evaluation(rows, {"prompts": 2, "model": model}, [], where, {"LPIPS": 1}).save(tmp_path / f"{name}.json")
    said = markdown([Outcome(name, True, 0.0, 1.0) for name in "abc"], tmp_path)
    first, second = said.split("PSNR, dB")[1:]
    assert "one; 1 threads" in first and "another; 1 threads" in second  # the machine that measured, not this one
    assert all(f"| {name} " in first for name in ("original", "a", "b")) and "| c " in second
    assert "30.5 (" in first and "30.500 (" not in first  # as many digits as the metric has


# --- on a cluster ----------------------------------------------------------------------------------------------------


def test_on_a_cluster() -> None:
    run_apart(Path(__file__).with_name("on_ray.py"))
