"""Speeds of layers: one measurement for each kind, kept for the same machine alone; and the rule that follows from them."""

import json
from pathlib import Path

import pytest
import torch

from fp4dit_ao import CodebookTensor, MinifloatTensor, w4a6_codebook
from fp4dit_ao.evaluation import layer_speed
from fp4dit_ao.evaluation.layer_speed import better_in_bfloat16, kind_of, layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.util.user_cache import VARIABLE

CPU = torch.device("cpu")


class Measurer:
    """Gives made-up speeds, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], int, int, float]] = []
        self.steady = True

    def __call__(self, groups, rows, device, seconds) -> LayerSpeed:
        features = sum(weight.shape[0] for weight in groups[0])
        self.asked.append(((features, groups[0][0].shape[1]), len(groups), rows, seconds))
        return LayerSpeed(1.0, float(rows), float(rows), self.steady)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def packed(out: int = 8, depth: int = 64, fmt: str = "e2m1", act: str | None = "e2m3") -> MinifloatTensor:
    return MinifloatTensor.from_hp(torch.randn(out, depth), [1, 32], fmt, act)


WEIGHTS = {"q": packed(), "k": packed(), "up": packed(16), "down": packed(8, 64, "e3m0"), "text": packed()}
ROWS = {"q": 10, "k": 10, "up": 10, "down": 10, "text": 3}


def test_one_measurement_serves_all_linears_of_a_kind() -> None:
    measurer, said = Measurer(), []
    found = layer_speeds(WEIGHTS, ROWS, CPU, measurer=measurer, progress=said.append)
    share = layer_speed.BUDGET_SECONDS / 4
    assert measurer.asked == [
        ((8, 64), 2, 10, share),
        ((16, 64), 1, 10, share),
        ((8, 64), 1, 10, share),
        ((8, 64), 1, 3, share),
    ]
    assert {name: speed.speed for name, speed in found.items()} == {name: float(rows) for name, rows in ROWS.items()}
    assert said[1] == "measuring 2 of 4: 16 x 64, 10 tokens"


def test_linears_that_share_their_input_are_measured_together_and_have_their_shares() -> None:
    """The made-up clock says one second for a group, and ten for it in bfloat16."""
    inputs = {"q": "x", "k": "x", "up": "x", "down": "h", "text": "t"}
    measurer, said = Measurer(), []
    found = layer_speeds(WEIGHTS, ROWS, CPU, inputs=inputs, measurer=measurer, progress=said.append)
    assert [asked[:3] for asked in measurer.asked] == [((8 + 8 + 16, 64), 1, 10), ((8, 64), 1, 10), ((8, 64), 1, 3)]
    assert list(found) == list(WEIGHTS)
    assert found["q"] == found["k"] == LayerSpeed(0.25, 2.5, 10.0)
    assert found["up"] == LayerSpeed(0.5, 5.0, 10.0)
    assert found["down"] == LayerSpeed(1.0, 10.0, 10.0)
    assert said[0] == "measuring 1 of 3: 16 x 64 and 8 x 64 and 8 x 64, 10 tokens"
    again = Measurer()
    assert layer_speeds(WEIGHTS, ROWS, CPU, inputs=inputs, measurer=again) == found
    assert again.asked == []
    layer_speeds(WEIGHTS, ROWS, CPU, measurer=again)  # each with its own input: other kinds, but for those that had it
    assert len(again.asked) == 2


def test_inputs_of_two_formats_are_quantized_twice_and_measured_apart() -> None:
    measurer = Measurer()
    weights = {"a": packed(), "b": packed(act="e3m4"), "c": packed(16)}
    layer_speeds(weights, dict.fromkeys(weights, 10), CPU, inputs=dict.fromkeys(weights, "x"), measurer=measurer)
    assert [asked[0] for asked in measurer.asked] == [(24, 64), (8, 64)]


def test_a_text_that_all_blocks_read_is_measured_with_eight_linears_at_a_time(monkeypatch) -> None:
    measurer = Measurer()
    weights = {f"{n}": packed() for n in range(20)}
    shared = dict.fromkeys(weights, "text")
    found = layer_speeds(weights, dict.fromkeys(weights, 10), CPU, inputs=shared, measurer=measurer)
    assert [asked[:2] for asked in measurer.asked] == [((64, 64), 2), ((32, 64), 1)]
    assert {speed.seconds for speed in found.values()} == {1 / 8, 1 / 4}
    monkeypatch.setattr(layer_speed, "MOST_BYTES", 3 * 2 * 8 * 64)  # in bfloat16
    layer_speeds(weights, dict.fromkeys(weights, 11), CPU, inputs=shared, measurer=measurer)
    assert [asked[:2] for asked in measurer.asked[2:]] == [((24, 64), 6), ((16, 64), 1)]


def test_a_linear_that_no_call_reaches_is_left_out() -> None:
    assert list(layer_speeds(WEIGHTS, {"q": 10}, CPU, measurer=Measurer())) == ["q"]


def test_results_are_kept_until_asked_again(folder) -> None:
    first = layer_speeds(WEIGHTS, ROWS, CPU, measurer=Measurer())
    second, third = Measurer(), Measurer()
    assert layer_speeds(WEIGHTS, ROWS, CPU, measurer=second) == first
    assert second.asked == []
    layer_speeds(WEIGHTS, ROWS | {"q": 11, "k": 11}, CPU, measurer=second)
    assert [asked[2] for asked in second.asked] == [11]
    layer_speeds(WEIGHTS, ROWS, CPU, again=True, measurer=third)
    assert len(third.asked) == 4
    [file] = folder.iterdir()
    kept = json.loads(file.read_text())
    assert len(kept["measured"]) == 5  # what was not asked again is still there
    assert kept["machine"]["torch"] == torch.__version__


def test_results_of_a_busy_machine_are_used_but_not_kept() -> None:
    measurer = Measurer()
    measurer.steady = False
    with pytest.warns(UserWarning, match="other work disturbs the measuring of 4 of 4 kinds of linears"):
        found = layer_speeds(WEIGHTS, ROWS, CPU, measurer=measurer)
    assert found["q"].speed == 10.0
    again = Measurer()
    layer_speeds(WEIGHTS, ROWS, CPU, measurer=again)
    assert len(again.asked) == 4


@pytest.mark.parametrize("part", ["torch", "threads", "processor", "fp4dit-ao", "library"])
def test_another_machine_or_version_is_measured_itself(part, monkeypatch) -> None:
    layer_speeds(WEIGHTS, ROWS, CPU, measurer=Measurer())
    here = layer_speed.this_machine(CPU)
    monkeypatch.setattr(layer_speed, "this_machine", lambda device: here | {part: "other"})
    measurer = Measurer()
    layer_speeds(WEIGHTS, ROWS, CPU, measurer=measurer)
    assert len(measurer.asked) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"machine"', '"engine"'),
        lambda text: text.replace("10.0", "NaN").replace("3.0", "-3.0"),
        lambda text: text.replace("10.0", '"10"').replace("3.0", "0.0"),
        lambda text: json.dumps(json.loads(text) | {"measured": [1]}),
    ],
    ids=["cut", "keys", "numbers", "types", "list"],
)
def test_a_damaged_file_is_ignored_and_written_anew(damage, folder) -> None:
    first = layer_speeds(WEIGHTS, ROWS, CPU, measurer=Measurer())
    [file] = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    measurer = Measurer()
    assert layer_speeds(WEIGHTS, ROWS, CPU, measurer=measurer) == first
    assert len(measurer.asked) == 4
    assert json.loads(file.read_text()) == json.loads(whole)


def test_what_decides_speed_makes_another_kind() -> None:
    config = w4a6_codebook()
    codebook = scheme_of(config).round_to_nearest("fc", torch.randn(8, 128), config)
    assert isinstance(codebook, CodebookTensor)
    kinds = [
        kind_of(weight, rows, CPU)
        for weight, rows in (
            (packed(), 10),
            (packed(), 11),
            (packed(fmt="e3m0"), 10),
            (packed(act="e3m4"), 10),
            (codebook, 10),
        )
    ]
    assert len(set(kinds)) == len(kinds)
    assert kind_of(packed(), 10, CPU) == kinds[0]  # not the values
    assert kind_of(packed().to(torch.bfloat16), 10, CPU) == kinds[0]  # measured in bfloat16 in any case


def test_the_rule_never_picks_what_is_slower_than_bfloat16() -> None:
    speeds = {name: LayerSpeed(1.0, speed, speed) for name, speed in (("a", 0.5), ("b", 1.0), ("c", 2.0), ("d", 0.999))}
    picked = better_in_bfloat16(speeds, torch.bfloat16)
    assert picked == ["a", "d"]
    assert all(speeds[name].speed >= 1 for name in speeds.keys() - set(picked))
    busy = {name: speed._replace(steady=False) for name, speed in speeds.items()}
    assert better_in_bfloat16(busy, torch.bfloat16) == []
    for exacter in (torch.float32, torch.float16):
        assert better_in_bfloat16(speeds, exacter) == []
