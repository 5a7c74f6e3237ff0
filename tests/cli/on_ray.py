"""A sweep on a local cluster of two workers: rows side by side, and a lost worker's row starts again.

A file of its own, which ``test_sweep.py`` runs in a process of its own.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fp4dit_ao.cli.app import app
from fp4dit_ao.cli.sweep import Outcome, sweep
from tests.cli.test_sweep import accepted, pretend, write
from tests.ray_cluster import ray_cluster
from tests.tiny import CALL, tiny_pipeline

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


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
