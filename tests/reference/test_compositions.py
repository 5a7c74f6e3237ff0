"""The composition model: prompts and pictures agree, held-out combinations stay so, the judge sees what is there."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fp4dit_ao import reference
from fp4dit_ao.reference.compositions import accuracy, timed_run, train
from fp4dit_ao.reference.compositions.architecture import build_tokenizer, pixel_autoencoder
from fp4dit_ao.reference.compositions.assembly import assemble
from fp4dit_ao.reference.compositions.judge import Judge, Seen, Sighting, asked_for, verdict
from fp4dit_ao.reference.compositions.layouts import CANVAS, SIDES
from fp4dit_ao.reference.compositions.scenes import LAYOUTS, LETTERS, WORDS, Scenes, is_held_out, prompt
from fp4dit_ao.reference.compositions.stickers import Painter, cut_out
from fp4dit_ao.reference.compositions.vocabulary import COLOURS, EMOJI, TEXT_LENGTH, plural, with_article
from fp4dit_ao.reference.compositions.weight_files import read_weights, write_weights


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(build_tokenizer())


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene_of(text: str) -> list[int]:
    """The scene of a wording with a tiger (a), a tulip (b) and a lemon (c) on blue."""
    [layout, *_] = [i for i, layout in enumerate(LAYOUTS) if layout.text == text]
    return [layout, *(WORDS.index(word) for word in ("tiger", "tulip", "lemon")), list(COLOURS).index("blue")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a} left of {b}", "a tiger left of a tulip on blue"),
        ("{a} and {b} above {c}", "a tiger and a tulip above a lemon on blue"),
        ("{big a}", "a big tiger on blue"),
        ("two {many a} and {b}", "two tigers and a tulip on blue"),
        ("{a} at the top left and {b} at the bottom right", "a tiger at the top left and a tulip at the bottom right on blue"),
    ],
)  # fmt: skip
def test_a_scene_reads_like_a_prompt(text: str, expected: str) -> None:
    assert prompt(scene_of(text)) == expected


def test_words_have_plurals_articles_and_pictures() -> None:
    assert [plural(word) for word in ("tiger", "fox", "fly", "monkey", "mouse", "sheep", "peach")] == [
        "tigers", "foxes", "flies", "monkeys", "mice", "sheep", "peaches",
    ]  # fmt: skip
    assert [with_article(word) for word in ("owl", "unicorn", "tiger")] == ["an owl", "a unicorn", "a tiger"]
    assert set(EMOJI.values()) <= set(reference.prompts())
    assert len(set(EMOJI.values())) == len(EMOJI)


def test_token_ids_made_on_the_device_are_the_tokenizers(scenes: Scenes) -> None:
    tokenizer = build_tokenizer()
    scene = torch.cat([scenes.sample(500, random()), scenes.sample(500, random(), held_out=True)])
    texts = [prompt(row) for row in scene.tolist()]
    expected = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    ids, mask = scenes.tokens(scene)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    assert tokenizer.unk_token_id not in ids


def combinations(text: str) -> set[tuple[str, str]]:
    """Pairs of emoji, of an emoji with itself and with the colour, read from the words of a prompt."""
    singular = {plural(word): word for word in WORDS} | {word: word for word in WORDS}
    counts = Counter[str]()
    number = 1
    for word in text.rpartition(" on ")[0].split():
        number = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}.get(word, number)
        if word in singular:
            counts[singular[word]] += number
    colour = text.rpartition(" on ")[2]
    found = {(a, b) for a in counts for b in counts if a != b or counts[a] > 1}
    return found | {(word, colour) for word in counts}


def test_held_out_combinations_are_in_no_training_prompt_and_in_every_test_prompt(scenes: Scenes) -> None:
    for held_out in (False, True):
        texts = [prompt(row) for row in scenes.sample(1000, random(1), held_out).tolist()]
        assert len(set(texts)) > 900
        for text in texts:
            assert any(is_held_out(*pair) for pair in combinations(text)) == held_out, text


def test_a_tenth_of_the_combinations_is_held_out_whichever_comes_first() -> None:
    held = np.array([[is_held_out(a, b) for a in WORDS] for b in WORDS])
    assert (held == held.T).all()
    assert 0.08 < held.mean() < 0.12


def test_emoji_stay_in_the_picture_and_apart(scenes: Scenes) -> None:
    drawn = scenes.place(scenes.sample(2000, random()), random())
    side = torch.where(drawn.big, SIDES[1], SIDES[0])
    for start in (drawn.left, drawn.top):
        assert ((start >= 0) & (start + side <= CANVAS))[drawn.present].all()
    for i in range(4):
        for j in range(i):
            both = drawn.present[:, i] & drawn.present[:, j]
            apart = torch.maximum(
                (drawn.left[:, i] - drawn.left[:, j]).abs(), (drawn.top[:, i] - drawn.top[:, j]).abs()
            )
            assert (apart >= SIDES[0])[both].all()


def test_a_sticker_has_the_colours_of_its_emoji_and_an_open_ground() -> None:
    tiger = reference.pictures()[reference.prompts().index("tiger face")]
    sticker = cut_out(tiger)
    assert (sticker[..., :3] == tiger).all()
    assert sticker[0, 0, 3] == 0
    assert sticker[32, 32, 3] == 255
    assert (tiger[sticker[..., 3] == 0] > 240).all()


def test_the_judge_sees_real_pictures_as_their_prompts_say(scenes: Scenes) -> None:
    rows = scenes.sample(5, random(3), held_out=True)
    pictures = Painter()(scenes.place(rows, random(3)))
    judge = Judge()
    marks = [verdict(row, seen) for row, seen in zip(rows.tolist(), judge(pictures), strict=True)]
    assert all(mark["all"] == 1 for mark in marks)
    wrong = [verdict(row, seen) for row, seen in zip(rows.tolist(), judge(pictures.roll(1, 0)), strict=True)]
    assert not any(mark["all"] for mark in wrong)


def test_verdicts_tell_attributes_apart() -> None:
    scene = scene_of("{a} left of {b}")
    tiger, tulip = Sighting("tiger", 0, 16, False), Sighting("tulip", 32, 20, False)

    def marks(colour: str, *emoji: Sighting) -> dict[str, float | None]:
        return verdict(scene, Seen(colour, emoji))

    assert asked_for(scene) == {"tiger": 1, "tulip": 1}
    assert marks("blue", tulip, tiger) == {"emoji": 1, "where": 1, "colour": 1, "count": 1, "all": 1}
    assert marks("red", tiger, tulip) == {"emoji": 1, "where": 1, "colour": 0, "count": 1, "all": 0}
    mirrored = (Sighting("tiger", 32, 16, False), Sighting("tulip", 0, 20, False))
    assert marks("blue", *mirrored) == {"emoji": 1, "where": 0, "colour": 1, "count": 1, "all": 0}
    assert marks("blue", tiger) == {"emoji": 0.5, "where": 0, "colour": 1, "count": 0, "all": 0}
    other = Sighting("lion", 32, 20, False)
    assert marks("blue", tiger, other) == {"emoji": 0.5, "where": 0, "colour": 1, "count": 1, "all": 0}
    assert marks("blue", tiger, tulip, other) == {"emoji": 1, "where": 1, "colour": 1, "count": 0, "all": 0}
    counted = scene_of("two {many a}")
    assert verdict(counted, Seen("blue", (tiger, tiger)))["where"] is None
    assert verdict(scene_of("{big a}"), Seen("blue", (tiger,)))["where"] == 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_the_autoencoder_changes_nothing(dtype: torch.dtype, bound: float) -> None:
    model = pixel_autoencoder().to(dtype)
    pictures = torch.rand(2, 3, 16, 16, generator=random()) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pictures.to(dtype)).latent_dist.sample(random())
        back = model.decode(pictures.to(dtype)).sample
    for found in (latents, back):
        assert (found.float() - pictures).abs().max() < bound


def test_weights_come_back_from_small_files_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4dit_ao.reference.compositions.weight_files.LARGEST", 1000)
    tensors = {f"t{i}": torch.randn(200, generator=random(i)) for i in range(5)}
    write_weights(tensors, tmp_path, 7)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 3
    found = read_weights(tmp_path)
    assert {name: tensor.bfloat16().tolist() for name, tensor in tensors.items()} == {
        n: t.tolist() for n, t in found.items()
    }
    with pytest.raises(FileNotFoundError, match="train first"):
        read_weights(tmp_path / "nowhere")


def test_the_learning_rate_ends_at_zero_when_the_time_does(tmp_path: Path) -> None:
    run = timed_run.TimedRun(tmp_path, torch.nn.Linear(2, 2), 1.0, 0.0, 0)
    run.step = 10_000
    rates = []
    for run.seconds in (0.0, 30.0, 70.0, 100.0, 130.0):
        rates.append(round(run.rate(100.0), 3))
    assert rates == [1, 1, 0.5, 0, 0]
    run.step, run.seconds = 99, 0.0
    assert run.rate(100.0) == 100 / timed_run.WARM_UP


def test_a_loss_that_is_no_number_takes_the_run_back_to_its_last_save(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    run = timed_run.TimedRun(tmp_path, layer, 0.1, 0.0, 0)
    saves: list[int] = []

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        poison = float("nan") if run.step == 3 and run.lr == 0.1 else 1.0
        return (layer(torch.rand(4, 2, generator=generator)) * poison).square().mean()

    # every step is saved, and time ends with the twelfth save
    with pytest.raises(StopIteration):

        def publish() -> None:
            saves.append(run.step)
            if len(saves) == 12:
                raise StopIteration

        run.train_for(1e9, 0.0, loss_of, publish)
    assert run.lr == 0.05
    assert saves == [1, 2, 3, *range(3, 12)]
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_training_leaves_a_pipeline_that_draws_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    for step in (1, 2):  # a session takes one step at least
        train.main(
            out=out, work=work, minutes=1e-4, device="cpu", batch=2, width=128, layers=1, compiled=False, save_every=60
        )
        record = json.loads((out / "training.json").read_text())
        assert record["step"] == step
        assert len(record["loss"]) == step
    pipe = assemble(out)
    pipe.set_progress_bar_config(disable=True)
    chosen = accuracy.random_scenes(1, seed=0)
    images = accuracy.draw(pipe, chosen, 0, 1, num_inference_steps=2)
    assert images.shape == (1, CANVAS, CANVAS, 3)
    assert re.search(r" on \w+$", prompt(chosen[0]))
    assert {letter for letter, _, _ in LAYOUTS[chosen[0][0]].emoji} <= set(LETTERS)
