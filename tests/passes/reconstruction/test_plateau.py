"""Early stopping: a plateau brings the penalty on, then ends the unit; off by default, and repeatable."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fp4dit_ao import AdaRoundConfig, ReconstructionConfig, reconstruct
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine, iteration, unit_rounding
from fp4dit_ao.passes.reconstruction.plateau import Schedule
from tests.passes.reconstruction.test_iteration import prepared_graph

PATIENT = AdaRoundConfig(iters=60, batch_size=8, relative_lr=0.2, patience=4)


def test_all_steps_are_taken_by_default() -> None:
    schedule, betas = Schedule(ReconstructionConfig(iters=10, warmup=0.2)), []
    while not schedule.ended:
        betas.append(schedule.beta)
        schedule.advance()
    assert betas == [None, None, *(20 - 18 * i / 8 for i in range(8))]


def test_a_plateau_brings_the_penalty_on_then_hurries_then_ends() -> None:
    schedule = Schedule(ReconstructionConfig(iters=100, warmup=0.5, patience=10))
    for _ in range(10):
        schedule.advance()
    assert schedule.judge(1.0, 0.0) == 0  # nothing to compare with
    assert schedule.judge(0.98, 0.0) == 0
    assert schedule.judge(0.975, 0.0) == 40  # from step 10 to step 50
    assert schedule.beta == 20
    assert schedule.judge(1.7, 0.8) == 0  # with the penalty: another loss
    assert schedule.judge(1.6, 0.7) == 0
    assert schedule.judge(1.6, 0.7) == 10  # gates are open
    assert schedule.beta == 20 - 18 * 10 / 50
    assert schedule.judge(0.9, 0.009) == 0
    assert not schedule.ended
    assert schedule.judge(0.9, 0.009) == 40
    assert schedule.ended


def steps_of(config: ReconstructionConfig) -> tuple[int, torch.fx.GraphModule]:
    prepared, data = prepared_graph()
    count = [0]

    def counted(self, *args):
        count[0] += 1
        return run(self, *args)

    run = iteration.Iteration.run
    with mock.patch.object(iteration.Iteration, "run", counted):
        report = reconstruct(prepared, data, config, progress=False)
    assert report.rows[0].kept == "learned"
    return count[0], prepared


def test_fewer_steps_are_taken_and_the_same_every_time() -> None:
    whole, _ = steps_of(replace(PATIENT, patience=None))
    few, first = steps_of(PATIENT)
    again, second = steps_of(PATIENT)
    assert whole == 60
    assert few == again < 60
    codes = [[observer.codes for _, observer in weight_observers(graph)] for graph in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_a_killed_run_with_patience_resumes_with_the_same_bits(tmp_path, monkeypatch) -> None:
    whole, data = prepared_graph(layers=2)
    killed, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    reconstruct(whole, data, PATIENT, progress=False)
    done = []

    def dies_in_the_second_unit(error, *args):
        done.append(error)
        if len(done) == 2:
            raise KeyboardInterrupt
        return unit_rounding.round_unit(error, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "round_unit", dies_in_the_second_unit)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(killed, data, PATIENT, checkpoint_dir=tmp_path, progress=False)
    reconstruct(resumed, data, PATIENT, checkpoint_dir=tmp_path, progress=False)
    codes = [[observer.codes for _, observer in weight_observers(graph)] for graph in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    with pytest.raises(ValueError, match="belongs to another run"):
        reconstruct(resumed, data, replace(PATIENT, patience=40), checkpoint_dir=tmp_path, progress=False)
