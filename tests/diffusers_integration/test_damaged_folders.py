"""Damaged files of a pipeline's folder, but the transformer's: it loads, or a sentence names the component and the remedy."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4dit_ao import load_pipeline, quantize_modules
from fp4dit_ao.diffusers_integration.pipeline_folder import save_pipeline
from tests.tiny import tiny_pipeline

FILES = (
    "generation.json", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "vae/config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = tiny_pipeline(layers=1, width=64)
    pipe.transformer = quantize_modules(pipe.transformer, "w4a6")
    pipe.generation_defaults = {"num_inference_steps": 2}
    path: Path = tmp_path_factory.mktemp("saved") / "pipe"
    save_pipeline(pipe, path)
    return path


def damaged(whole: bytes) -> Iterator[bytes]:
    """The file emptied, cut, with other JSON in it, and with each of its values replaced by an object."""
    yield from (b"", whole[: len(whole) // 2], b"{}", b"[]", b"\xff\xfe{}")
    data = json.loads(whole)
    yield from (json.dumps(data | {key: {"a": 1}}).encode() for key in data)


def test_every_file_is_among_them(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
    assert found - {name for name in found if name.startswith("transformer/")} == {*FILES, "checksums.json"}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(folder: Path, tmp_path: Path, name: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "pipe"))
    file, whole, refused = copied / name, (copied / name).read_bytes(), 0
    for content in damaged(whole):
        file.write_bytes(content)
        try:
            load_pipeline(copied, form="module")
        except ValueError as error:
            refused += 1
            message = str(error)
            assert str(copied / name.partition("/")[0]) in message, content
            assert "\n" not in message
            assert "; " in message, "the remedy"
    assert refused >= 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer/tokenizer.json", "{}", "pipe/tokenizer cannot be loaded as .*: KeyError 'added_tokens'; check .*r.json"),
        ("vae/config.json", '{"block_out_channels": {}}', "pipe/vae cannot be loaded as AutoencoderKL: .*; check config.json"),
        ("generation.json", "[]", r"pipe/generation.json must hold a JSON object .*, found list; repair or delete it"),
    ],
)  # fmt: skip
def test_what_is_said(folder: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "pipe"))
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pipeline(copied, form="module")
