"""The published protocols run to their end: on the reference pipeline, and deepcompressor's on tiny models and files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from benchmarks import paper_table
from fp4dit_ao import reference
from fp4dit_ao.evaluation.image_metrics.lpips import features
from fp4dit_ao.evaluation.prompt_sets import Prompt
from tests.evaluation.tiny_judges import tiny_clip, tiny_dino
from tests.tiny import CALL, tiny_pipeline

RANDOM = np.random.default_rng(0)


def test_the_protocols_are_the_published_ones() -> None:
    known = paper_table.protocols()
    ours = known["fp4dit-pixart-sigma"]
    assert (ours.wanted.count, ours.wanted.seeds, ours.wanted.seeding) == (10_000, (42,), "same")
    assert {name: row.fields.get("weight") for name, row in ours.rows.items() if row.methods.rounding == "scale_aware"} == {
        "W4A8": "e1m2", "W4A6": "e1m2",
    }  # fmt: skip
    assert ours.rows["W4A6"].methods.iters == 2500
    assert (known["fp4dit-hunyuan-hpsv2"].wanted.prompt_set, known["fp4dit-hunyuan-hpsv2"].real) == ("hpsv2", None)
    theirs = known["deepcompressor"]
    assert (theirs.wanted.count, theirs.wanted.sample, theirs.wanted.seeding) == (5000, "shuffled", "name")
    assert theirs.wanted.call == {"num_inference_steps": 20, "guidance_scale": 4.5}
    assert {"image_reward", "lpips", "fid", "clip"} <= set(theirs.metrics)


def test_it_runs_to_its_end_on_the_reference_pipeline_and_resumes(tmp_path, capsys, monkeypatch) -> None:
    options = {"count": 2, "steps": 2, "samples": 2, "rows": "W4A6, nearest", "work": tmp_path}
    paper_table.main("reference", **options)
    said = capsys.readouterr().out
    folder = tmp_path / "reference"
    data = json.loads((folder / "table.json").read_text())
    assert [row["name"] for row in data["variants"]] == ["original", "W4A6, nearest", "original, batch size 3"]
    assert "prompt accuracy" in said and (folder / "table.html").stat().st_size > 10_000
    assert len(list((folder / "images").rglob("*.png"))) == 3 * 6

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("quantized or drawn again")

    monkeypatch.setattr(paper_table, "quantize", refuse)
    monkeypatch.setattr("fp4dit_ao.cli.drawing.draw_missing", refuse)
    paper_table.main("reference", **options)
    again = json.loads((folder / "table.json").read_text())
    assert again["variants"] == data["variants"]


def test_a_row_with_other_settings_is_quantized_again(tmp_path, monkeypatch) -> None:
    made = []

    def pretend(model: str, out: Path, **options: object) -> None:
        made.append(out)
        out.mkdir(parents=True)
        (out / "model_index.json").touch()

    monkeypatch.setattr(paper_table, "quantize", pretend)
    texts = [Prompt(text, text) for text in reference.prompts()]
    monkeypatch.setattr(paper_table.WantedImages, "texts", lambda self, model: texts[: self.count])
    protocol = paper_table.protocols()["reference"]
    wanted = replace(protocol.wanted, count=2)
    run = paper_table.Run(protocol, tmp_path, "reference", wanted, "stored", samples=2)
    row = protocol.rows["W4A6"]
    first = run.quantized("W4A6", row)
    assert run.quantized("W4A6", row) == first and len(made) == 1
    others = [
        replace(run, iters=3), replace(run, samples=4), replace(run, dtype="bfloat16"), replace(run, model="owner/other"),
        replace(run, wanted=replace(wanted, count=3)), replace(run, wanted=replace(wanted, call={"num_inference_steps": 2})),
    ]  # fmt: skip
    folders = {
        first,
        run.quantized("W4A6", replace(row, recipe="w4a8")),
        *(one.quantized("W4A6", row) for one in others),
    }
    assert len(folders) == len(made) == 8


def test_deepcompressors_table_on_small_things(tmp_path, capsys) -> None:
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation.json").write_text(json.dumps(CALL))
    names = [f"{n:040x}" for n in range(8)]
    (tmp_path / "meta_data.json").write_text(json.dumps({name: {"prompt": f"a red cat {name[-1]}"} for name in names}))
    (tmp_path / "real" / "people").mkdir(parents=True)
    for name in names:
        pixels = RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / "people" / f"{name}.jpg")
    clip, dino = tiny_clip(tmp_path / "tiny-clip"), tiny_dino(tmp_path / "tiny-dino")
    network = {f"features.{name}": value for name, value in features("alex").state_dict().items()}
    torch.save(network, tmp_path / "alex.pth")
    monkey = {"clip": clip, "hpsv2": clip, "cmmd": clip, "fid": dino, "kid": dino, "lpips": tmp_path / "alex.pth"}
    with pytest.raises(OSError, match="image_reward"):  # no weights of it: said before anything is drawn
        run(tmp_path, monkey, metrics=paper_table.EVERYTHING)
    run(tmp_path, monkey, metrics=tuple(monkey))
    head = next(line for line in capsys.readouterr().out.splitlines() if "PSNR" in line)
    for title in ("CLIP score (tiny-clip)", "HPSv2 (tiny-clip)", "LPIPS (alex)", "FID (tiny-dino) to real images"):
        assert title in head
    assert len(list((tmp_path / "work" / "deepcompressor" / "real").iterdir())) == 4


def run(folder, weights, metrics) -> None:
    protocol = paper_table.protocols()["deepcompressor"]
    table = {"deepcompressor": paper_table.Protocol(**{**vars(protocol), "metrics": metrics})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_table, "protocols", lambda: table)
        patch.setenv("HF_HUB_OFFLINE", "1")
        paper_table.main(
            "deepcompressor", folder / "meta_data.json", real=folder / "real", model=str(folder / "model"),
            metric=[f"{name}={path}" for name, path in weights.items()], rows="NVFP4, nearest", work=folder / "work",
            count=4, steps=1, samples=2, dtype="stored",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"table": "svdquant"}, "no table svdquant; there are fp4dit-pixart-alpha"),
        ({"table": "deepcompressor"}, "needs --prompts FILE of the prompt set mjhq"),
        ({"table": "reference", "rows": "W2A2"}, "no row W2A2; there are W4A6, nearest"),
    ],
)
def test_what_is_refused(arguments, words, tmp_path) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        paper_table.main(**arguments, work=tmp_path)
