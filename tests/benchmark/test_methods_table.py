"""The table of every method: its rows, its corrected tests, and what it recommends."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import method_rows, methods
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.evaluation.fidelity import Fidelity
from fp4dit_ao.graph_capture.transforming import resolve_transforms
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.reconstruction import OBJECTIVES, ROUNDINGS, SCOPES
from fp4dit_ao.passes.transforms.registry import TRANSFORMS


def fidelity(name: str, psnr: np.ndarray, bits: float = 4.2, seconds: float = 10) -> Fidelity:
    notes = {"bits": f"{bits:.2f}", "MB": "4", "quantize, s": f"{seconds:.0f}", "peak, MB": "700", "speed": "1.00"}
    return Fidelity(name, psnr, np.full_like(psnr, 0.9), notes=notes)


@pytest.mark.parametrize("budget", method_rows.BUDGETS)
def test_every_registered_method_has_a_row(budget: str) -> None:
    rows = method_rows.rows_of(budget)
    assert {row.rounding for row in rows.values()} == set(ROUNDINGS)
    assert {name.partition(":")[0] for row in rows.values() for name in row.transforms} == set(TRANSFORMS)
    resolve_transforms([name for row in rows.values() for name in row.transforms])
    assert {row.objective for row in rows.values()} == set(OBJECTIVES)
    assert {row.scope for row in rows.values()} == set(SCOPES)
    assert {row.fine_tuning for row in rows.values()} == {None, *FINE_TUNINGS}
    for row in rows.values():
        assert row.config is not None
        if row.base is not None:
            base = rows[row.base]
            assert base.rounding == "nearest" and not base.transforms and base.fine_tuning is None
            assert base.config == row.config


def test_chance_is_not_called_significant_and_an_effect_is() -> None:
    """Of a hundred rows without an effect at most a few are found by a plain test; corrected, none; one of 1 dB is."""
    rng = np.random.default_rng(0)
    nothing = [rng.normal(0, 1, (1, 40)) for _ in range(100)]
    plain = [float(methods.stats.ttest_1samp(each.mean(0), 0).pvalue) for each in nothing]
    assert any(p < methods.SIGNIFICANT for p in plain)
    found = methods.adjusted([*nothing, rng.normal(1, 1, (1, 40))])
    assert all(p >= methods.SIGNIFICANT for p in found[:-1])
    assert found[-1] < methods.SIGNIFICANT
    assert methods.adjusted([np.zeros((1, 5))]) == [1.0]
    assert methods.adjusted([]) == []


def test_the_table_says_what_was_shown() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(35, 1, (1, 40))
    rows = {
        "full": method_rows.Row("full precision", None), "w4a6-nearest": method_rows.Row("nearest", None),
        **{f"w4a6-{name}": method_rows.Row(name, None, base="w4a6-nearest") for name in ("good", "bad", "same")},
    }  # fmt: skip
    done = {
        "full": fidelity("full precision", np.full((1, 40), 100.0), 16, 0),
        "w4a6-nearest": fidelity("nearest", base),
        "w4a6-good": fidelity("good", base + rng.normal(1, 0.5, (1, 40))),
        "w4a6-bad": fidelity("bad", base - rng.normal(1, 0.5, (1, 40))),
        "w4a6-same": fidelity("same", base + rng.normal(0, 0.5, (1, 40))),
    }
    lines = {line.split("|")[2].strip(): line for line in methods.table(rows, done).splitlines()[2:]}
    assert "identical" in lines["full precision"]
    assert "dB: better" in lines["good"] and "dB: worse" in lines["bad"] and "no difference shown" in lines["same"]
    assert "dB:" not in lines["nearest"]


def test_recommendations_keep_the_limits() -> None:
    done = {
        "full": fidelity("full precision", np.full((1, 4), 100.0), 16, 0),
        "w4a6-a": fidelity("quick", np.full((1, 4), 30.0), 4.2, 5),
        "w4a8-b": fidelity("slow", np.full((1, 4), 35.0), 4.2, 500),
        "w4a6-c": fidelity("large", np.full((1, 4), 40.0), 7.1, 30),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:5]] for line in methods.recommendations(done).splitlines()[2:]]
    assert (
        ["4.3", "60", "W4A6", "quick"] in lines
        and ["4.3", "600", "W4A8", "slow"] in lines
        and ["5.3", "3600", "W4A8", "slow"] in lines
    )
    assert ["8.5", "60", "W4A6", "large"] in lines
    assert not any("full precision" in line for line in lines)


def test_rows_made_on_several_machines_are_one_table(tmp_path: Path) -> None:
    kept, out = tmp_path / "rows", tmp_path / "table.md"
    kept.mkdir()
    psnr = np.random.default_rng(0).normal(35, 1, (1, 40))
    for key, name, values, processor in (
        ("full", "full precision", np.full((1, 40), 100.0), "old machine"), ("w4a6-nearest", "nearest", psnr, "old machine"),
        ("w4a6-gptq", "gptq", psnr + 1 + 0.01 * psnr, "new machine"),
    ):  # fmt: skip
        made = fidelity(name, values).to_dict() | {"environment": environment() | {"processor": processor}}
        (kept / f"{key}.json").write_text(json.dumps(made))
    keys = ("full", "w4a6-nearest", "w4a6-gptq", "w4a6-lrq")
    app = typer.Typer()
    app.command()(methods.main)
    given = ["--no-make", "--budgets=w4a6", f"--only={','.join(keys[1:])}", f"--rows={kept}", f"--out={out}"]
    result = CliRunner().invoke(app, [*given, f"--work={tmp_path / 'work'}"], catch_exceptions=False)
    text = out.read_text()
    assert result.exit_code == 0 and text in result.output
    assert "2 rows on old machine" in text and "1 row on new machine" in text
    assert "Not made yet: w4a6-lrq." in text
    assert "dB: better" in next(line for line in text.splitlines() if "| gptq" in line)
    other = CliRunner().invoke(app, [*given, f"--work={tmp_path / 'work'}", "--steps=2"])
    assert other.exit_code and "other settings" in " ".join(other.output.split())

    work = tmp_path / "work"
    assert methods.unfinished(keys[:3], work, kept) == []
    assert methods.unfinished(keys, work, kept) == ["full", "w4a6-lrq"]  # the original's images are on the old machine
    (work / "full.npz").touch()
    assert methods.unfinished(keys, work, kept) == ["w4a6-lrq"]
