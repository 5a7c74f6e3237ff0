"""Images that are kept: interrupted, shared out or repeated, a run gives the same bits."""

from types import SimpleNamespace

import numpy as np
import pytest

from fp4dit_ao.evaluation.baseline_variance import OTHER_WAYS, other_way
from fp4dit_ao.evaluation.drawing import draw_missing, seconds_per_image
from fp4dit_ao.evaluation.kept_images import KeptImages, folder_of_images
from fp4dit_ao.evaluation.prompt_sets import Prompt
from fp4dit_ao.evaluation.seeding import seeding

PROMPTS = [Prompt(text, str(n)) for n, text in enumerate(("red cat", "blue dog", "tree"))]
SEEDS = (5, 6)


class Painter:
    """A pipeline whose images show the batch they were drawn in, and which fails after some images."""

    def __init__(self, most: int = 99) -> None:
        self.most, self.drawn, self.batches = most, 0, []

    def __call__(self, prompts, generator, output_type="np", **call):
        self.drawn += len(prompts)
        if self.drawn > self.most:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        levels = [(one.initial_seed() % 97 + len(prompts)) / 255 for one in generator]
        return SimpleNamespace(images=np.stack([np.full((8, 8, 3), level) for level in levels]))

    def set_progress_bar_config(self, **options: object) -> None:
        pass


def draw(folder, pipe=None, shard=(0, 1), batch_size=4, settings=None) -> KeptImages:
    kept = KeptImages(folder, "a model", settings or {"steps": 2}, len(SEEDS), len(PROMPTS))
    draw_missing(pipe or Painter(), kept, PROMPTS, SEEDS, seeding("distinct"), batch_size=batch_size, shard=shard)
    return kept


def bits(kept) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in kept.folder.glob("*.png")}


def test_an_interrupted_run_goes_on_with_the_same_batches_and_bits(tmp_path) -> None:
    whole = draw(tmp_path / "whole")
    assert len(bits(whole)) == 6
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "cut", Painter(most=4))
    rest = Painter()
    again = draw(tmp_path / "cut", rest)
    assert rest.batches == [["blue dog", "tree"]]
    assert bits(again) == bits(whole)
    assert again.missing() == []


def test_a_batch_of_which_one_image_is_lost_is_drawn_as_a_whole(tmp_path) -> None:
    kept = draw(tmp_path)
    before = bits(kept)
    kept.path(0, 1).unlink()
    pipe = Painter()
    assert bits(draw(tmp_path, pipe)) == before
    assert [len(batch) for batch in pipe.batches] == [4]


def test_shards_are_disjoint_and_together_the_whole(tmp_path) -> None:
    first, second = Painter(), Painter()
    draw(tmp_path / "shared", first, (0, 2), batch_size=2)
    shared = draw(tmp_path / "shared", second, (1, 2), batch_size=2)
    assert first.drawn + second.drawn == 6
    assert bits(shared) == bits(draw(tmp_path / "whole", batch_size=2))


def test_nothing_is_drawn_twice_and_other_settings_are_another_folder(tmp_path) -> None:
    kept = draw(tmp_path)
    idle = Painter()
    draw(tmp_path, idle)
    assert idle.drawn == 0
    other = draw(tmp_path, settings={"steps": 3})
    assert other.folder != kept.folder and len(bits(other)) == 6
    assert seconds_per_image(kept) >= 0


def test_images_come_back_in_order(tmp_path) -> None:
    kept = draw(tmp_path)
    found = list(kept.batches(5))
    assert [position for positions, _ in found for position in positions] == [
        (s, p) for s in range(2) for p in range(3)
    ]
    assert found[0][1].shape == (5, 8, 8, 3)
    seeds = [seeding("distinct")(SEEDS[s], p, PROMPTS[p]) for s in range(2) for p in range(3)]
    assert [int(image[0, 0, 0]) for _, images in found for image in images] == [
        seed % 97 + (4 if index < 4 else 2) for index, seed in enumerate(seeds)
    ]


def test_a_damaged_image_is_named_with_the_remedy(tmp_path) -> None:
    kept = draw(tmp_path)
    kept.path(1, 2).write_bytes(kept.path(1, 2).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"001-000002.png is not a whole image .*delete it"):
        kept.read(1, 2)


def test_a_folder_without_images_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there are no images in"):
        folder_of_images(tmp_path)
    kept = draw(tmp_path)
    assert len(folder_of_images(kept.folder.parent)) == 6


def test_other_ways_draw_the_same_differently() -> None:
    batch = OTHER_WAYS["batch"].batch
    assert (batch(16, 300), batch(16, 6), batch(1, 6)) == (8, 3, 2)
    assert OTHER_WAYS["kernel"].batch(16, 300) == 16
    with pytest.raises(ValueError, match="unknown --baseline 'size'; choose one of batch, compiled, kernel, or none"):
        other_way("size")
