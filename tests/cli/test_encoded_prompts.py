"""``quantize --encoded-prompts``: the text encoder is copied, never loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from fp4dit_ao import load_pipeline
from fp4dit_ao.cli.app import app
from tests.tiny import CALL, tiny_pipeline

PROMPTS = ["a red cat", "a blue dog"]
PLAIN = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
OPTIONS = [
    "--rounding", "nearest", "--recipe", "w4a6", "--steps", "2",
    *(option for name, value in PLAIN.items() for option in ("--call", f"{name}={json.dumps(value)}")),
]  # fmt: skip


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.fixture
def float_folder(tmp_path: Path) -> Path:
    pipe: Any = tiny_pipeline(layers=1)
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS, clean_caption=False, max_sequence_length=8)
    encoded = {
        "prompt_embeds": embeds, "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative[:1], "negative_prompt_attention_mask": negative_mask[:1],
    }  # fmt: skip
    save_file({name: x.contiguous() for name, x in encoded.items()}, tmp_path / "prompts.safetensors")
    pipe.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_the_text_encoder_is_never_loaded(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import T5EncoderModel

    root = float_folder.parent
    with monkeypatch.context() as patch:
        patch.setattr(T5EncoderModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded the text encoder"))
        done = command(float_folder, "--out", root / "q", "--encoded-prompts", root / "prompts.safetensors", *OPTIONS)
    assert done.exit_code == 0, done.output
    original = float_folder / "text_encoder" / "model.safetensors"
    assert (root / "q" / "text_encoder" / "model.safetensors").read_bytes() == original.read_bytes()
    index = json.loads((root / "q" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    loaded: Any = load_pipeline(root / "q")  # checksums cover what was copied
    assert loaded("a red cat", output_type="latent", **CALL).images.isfinite().all()


def test_bad_files_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "text.txt").write_text("a red cat\n")

    def refused(*options: object) -> str:
        done = command("reference", "--out", tmp_path / "q", *options)
        assert done.exit_code
        return done.output

    assert "there is no file of encoded prompts" in refused("--encoded-prompts", tmp_path / "none")
    assert "no safetensors file" in refused("--encoded-prompts", tmp_path / "text.txt")
    assert "must hold prompt_embeds" in refused("--encoded-prompts", tmp_path / "empty.safetensors")
    both = refused("--encoded-prompts", tmp_path / "empty.safetensors", "--prompts", tmp_path / "text.txt")
    assert "leave one out" in both
