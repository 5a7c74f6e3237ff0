"""A sweep on a local cluster of two workers: rows side by side, what is finished is kept, a lost worker's row starts again."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fp4dit_ao.cli.app import app, check_command
from fp4dit_ao.cli.sweep import Outcome, execute, markdown, read_rows, sweep
from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity
from tests.ray_cluster import ray_cluster
from tests.tiny import CALL, tiny_pipeline

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


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


def test_a_lost_workers_row_starts_again_and_a_failure_leaves_the_others(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(tmp_path / "t.json", [{"name": name, "model": name} for name in ("dies", "fails", "well")])
    settings: dict[str, Any] = {"cpus": 1, "gpus": 0, "address": None, "check": accepted, "run": pretend}
    with pytest.raises(RuntimeError, match=r"1 of 3 rows failed; see .*fails\.log; the same command goes on"):
        sweep(table, tmp_path, **settings)
    assert (tmp_path / "dies.died").exists()
    pids = {(tmp_path / name / "model").read_text() for name in ("dies", "well")}
    assert len(pids) == 2, "each row has a process"
    assert str(os.getpid()) not in pids
    said = (tmp_path / "sweep.md").read_text()
    assert [line.split()[1:4:2] for line in said.splitlines()[2:]] == [
        ["dies", "done"], ["fails", "failed"], ["well", "done"],
    ]  # fmt: skip
    assert said in capsys.readouterr().out


def test_the_command_quantizes_two_rows_side_by_side(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4dit_ao.cli import sweep as module

    tiny_pipeline(layers=1).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "generation.json").write_text(json.dumps(CALL))
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\n")
    shared = {"model": str(tmp_path / "float"), "prompts": str(tmp_path / "prompts.txt"), "samples": 2}
    judged = {"prompts": str(tmp_path / "prompts.txt"), "seeds": 1, "count": 2}
    rows = [
        {"name": "nearest", "recipe": "w4a6", "rounding": "nearest", "evaluate": judged} | shared,
        {"name": "gptq", "recipe": "w4a8", "rounding": "gptq", "evaluate": judged} | shared,
    ]
    seen: list[list[Outcome]] = []
    tabled = module.markdown
    monkeypatch.setattr(module, "markdown", lambda found, out: seen.append(list(found)) or tabled(found, out))
    table, out = write(tmp_path / "t.json", rows), tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", str(table), "--out", str(out)])
    assert result.exit_code == 0, result.output + "".join(path.read_text() for path in out.glob("*.log"))
    a, b = seen[0]
    assert max(a.began, b.began) < min(a.ended, b.ended), "at the same time, on two workers"
    lines = [line for line in (out / "sweep.md").read_text().splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines]
    assert names == ["row", "nearest", "gptq", "", Path(shared["model"]).name, "nearest", "gptq"]
