"""Prompts of benchmarks from files in the form that their authors publish, and the protocols' seeds."""

import json

import pytest

from fp4dit_ao.evaluation.prompt_sets import PROMPT_SETS, Prompt, read_prompt_set, shuffled
from fp4dit_ao.evaluation.seeding import SEEDINGS, seeding

FILES = {
    "lines": ("prompts.txt", "a red cat\n\na blue dog\n", ["00000", "00001"]),
    "coco": (
        "captions_val2014.json",
        json.dumps(
            {
                "images": [{"id": 9}],
                "annotations": [
                    {"image_id": 9, "id": 5, "caption": "a red cat "},
                    {"image_id": 7, "id": 2, "caption": "a blue dog"},
                ],
            }
        ),
        ["9-5", "7-2"],
    ),
    "mjhq": (
        "meta_data.json",
        json.dumps({"0b": {"category": "people", "prompt": "a red cat"}, "0a": {"prompt": "a blue dog"}}),
        ["0b", "0a"],
    ),
    "drawbench": ("drawbench.csv", "Prompts,Category\na red cat,Colors\na blue dog,Colors\n", ["00000", "00001"]),
    "parti": ("PartiPrompts.tsv", "Prompt\tCategory\na red cat\tAnimals\na blue dog\tAnimals\n", ["00000", "00001"]),
    "hpsv2": ("anime.json", json.dumps(["a red cat", "a blue dog"]), ["anime-00000", "anime-00001"]),
}  # fmt: skip


def test_every_set_is_tested() -> None:
    assert FILES.keys() == PROMPT_SETS.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_in_its_order(name, tmp_path) -> None:
    file, text, names = FILES[name]
    (tmp_path / file).write_text(text, encoding="utf-8")
    wanted = [Prompt("a red cat", names[0]), Prompt("a blue dog", names[1])]
    assert read_prompt_set(name, tmp_path / file) == wanted


def test_the_folder_of_hpsv2_is_its_styles_in_turn(tmp_path) -> None:
    for style in ("photo", "anime"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a cat, {style}"]))
    assert [prompt.text for prompt in read_prompt_set("hpsv2", tmp_path)] == ["a cat, anime", "a cat, photo"]


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"lines"}))
def test_another_file_is_refused_and_what_is_expected_said(name, tmp_path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    expected = next(info.summary for info in PROMPT_SETS.infos() if info.name == name)
    with pytest.raises(ValueError) as refused:
        read_prompt_set(name, tmp_path / "x.json")
    assert f"no file of the prompt set {name}" in str(refused.value) and expected in str(refused.value)


def test_a_missing_file_and_an_unknown_set_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompt_set("coco", tmp_path / "none.json")
    with pytest.raises(ValueError, match="unknown prompt set 'koko'; choose one of lines, coco"):
        read_prompt_set("koko", tmp_path)


def test_deepcompressors_sample() -> None:
    """Worked out with Python's own shuffle: ``random.Random(0)`` puts 0 … 9 in the order 7 8 1 5 3 4 2 0 9 6."""
    prompts = [Prompt(f"text {n}", str(n)) for n in range(10)]
    assert [prompt.name for prompt in shuffled(prompts, 4)] == ["1", "5", "7", "8"]


def test_seeds_of_the_protocols() -> None:
    prompt = Prompt("a cat", "ab")
    assert seeding("same")(42, 0, prompt) == seeding("same")(42, 9, prompt) == 42
    assert seeding("name")(0, 3, prompt) == 97 * 31 + 98
    long = Prompt("a cat", "0a1b2c3d4e5f6a7b8c9d")
    number = 0
    for letter in long.name.encode():
        number = number * 31 + letter
    assert seeding("name")(0, 0, long) == number % (10**9 + 7)
    distinct = {seeding("distinct")(seed, index, prompt) for seed in range(3) for index in range(100)}
    assert len(distinct) == 300
    with pytest.raises(ValueError, match="unknown seeding 'none'; choose one of distinct, same, name"):
        seeding("none")
    assert list(SEEDINGS) == ["distinct", "same", "name"]
