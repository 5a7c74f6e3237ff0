"""Drawing by several processes: what each is given, and which images are taken for the same."""

import multiprocessing
from types import SimpleNamespace

import pytest

from fp4dit_ao.cli.drawing import Drawing
from fp4dit_ao.evaluation.drawing import missing_batches
from fp4dit_ao.evaluation.prompt_sets import Prompt


@pytest.mark.parametrize(("devices", "shards"), [(1, 1), (3, 1), (2, 2), (3, 4)])
def test_every_batch_belongs_to_one_device_of_one_shard(devices, shards, tmp_path, monkeypatch) -> None:
    """Processes are replaced by calls; each says which part it was given."""
    parts = []

    class Called(SimpleNamespace):
        exitcode = 0

        def start(self) -> None:
            self.target(*self.args)

        def join(self) -> None:
            pass

    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Called))
    monkeypatch.setattr(Drawing, "draw", lambda self, device, shard=(0, 1): parts.append(shard))
    monkeypatch.setattr("fp4dit_ao.cli.drawing.files_of", lambda model: [])
    prompts = tuple(Prompt(str(n), str(n)) for n in range(30))
    drawing = Drawing("a/model", "a model", tmp_path, prompts, (0,), batch_size=1)
    for shard in range(shards):
        drawing.draw_on(["cpu"] * devices, (shard, shards))
    assert len(parts) == devices * shards
    drawn = [batch for part in parts for batch in missing_batches(drawing.kept(), 1, part)]
    assert sorted(drawn) == missing_batches(drawing.kept(), 1)


def test_another_version_draws_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fp4dit_ao.cli.drawing.files_of", lambda model: [])
    drawing = Drawing("a/model", "a model", tmp_path, (Prompt("cat", "0"),), (0,))
    before = drawing.kept().folder
    assert drawing.kept().folder == before
    monkeypatch.setattr("fp4dit_ao.cli.drawing.versions", lambda: {"torch": "0"})
    assert drawing.kept().folder != before
