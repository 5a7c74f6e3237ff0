"""Calibration data comes from the pipeline's own trajectories, and wrong data is refused in one sentence."""

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, calibrate, capture, collect_samples, w4a6
from fp4dit_ao.calibration import collection, read_prompts, sample_cache, size_in_bytes
from fp4dit_ao.observers import StaticActivationObserver
from tests.graphs import TinyDiT, tiny_sample
from tests.tiny import CALL, tiny_pipeline

PROMPTS = ["a red cat", "a blue dog", "green tree"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(layers=1)


def collect(pipe: Any, prompts: list[str] | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    return collect_samples(pipe, PROMPTS if prompts is None else prompts, progress=False, **(CALL | kwargs))


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)

    pairs = zip(a, b, strict=True)
    return all(s.keys() == t.keys() and all(equal(s[key], t[key]) for key in s) for s, t in pairs)


# --- collecting ------------------------------------------------------------------------------------------------------


def test_samples_are_the_calls_that_the_pipeline_makes(pipe: Any) -> None:
    samples = collect(pipe, samples=None)
    assert len(samples) == len(PROMPTS) * CALL["num_inference_steps"]
    pipe.scheduler.set_timesteps(CALL["num_inference_steps"])
    assert [s["timestep"][0] for s in samples] == [*pipe.scheduler.timesteps] * len(PROMPTS)
    for sample in samples:
        assert sample["hidden_states"].shape == (2, 4, 8, 8)  # both halves of guidance
        assert torch.equal(*sample["hidden_states"])
        assert not torch.equal(*sample["encoder_hidden_states"])
        assert pipe.transformer(**sample).sample.shape == (2, 4, 8, 8)
    # the second call of a prompt sees what the scheduler made of the first
    assert not torch.equal(samples[0]["hidden_states"], samples[1]["hidden_states"])


def test_the_trajectory_is_that_of_generation(pipe: Any) -> None:
    last = collect(pipe, PROMPTS[:1], samples=None, seed=7)[-1]
    latents: list[Tensor] = []
    call = CALL | {"output_type": "latent", "callback": lambda step, timestep, x: latents.append(x)}
    pipe(PROMPTS[0], **call, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(last["hidden_states"][0], latents[-2][0], rtol=0, atol=0)


def test_collecting_is_deterministic_and_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    bar = dict(pipe._progress_bar_config)
    assert same(collect(pipe, samples=3), collect(pipe, samples=3))
    assert not same(collect(pipe, samples=3), collect(pipe, samples=3, seed=1))
    assert pipe._progress_bar_config == bar
    assert not pipe.transformer._forward_pre_hooks


def test_nothing_is_decoded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.vae, "decode", lambda *a, **k: pytest.fail("decoded"))
    collect(pipe, samples=1)


def test_without_guidance_the_batch_is_half_as_large(pipe: Any) -> None:
    assert collect(pipe, samples=1, guidance_scale=1.0)[0]["hidden_states"].shape[0] == 1
    assert collect(pipe, samples=1, batch_size=3)[0]["hidden_states"].shape[0] == 6


def test_precomputed_embeddings_replace_prompts(pipe: Any) -> None:
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS, clean_caption=False, max_sequence_length=8)
    given_embeddings = {
        "prompt_embeds": embeds, "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative[:1], "negative_prompt_attention_mask": negative_mask[:1],
    }  # fmt: skip
    from_embeddings = collect_samples(pipe, samples=None, progress=False, **CALL, **given_embeddings)
    from_prompts = collect(pipe, samples=None)
    for a, b in zip(from_embeddings, from_prompts, strict=True):
        torch.testing.assert_close(a["encoder_hidden_states"], b["encoder_hidden_states"])
        torch.testing.assert_close(a["hidden_states"], b["hidden_states"])


def test_memory_limit_keeps_fewer_and_says_so(pipe: Any) -> None:
    everything = collect(pipe, samples=None)
    limit = size_in_bytes(everything) // 2
    with pytest.warns(UserWarning, match=r"keeping \d of 6 calibration samples"):
        fewer = collect(pipe, samples=None, memory_limit_bytes=limit)
    assert 1 <= len(fewer) < len(everything)
    assert size_in_bytes(fewer) <= limit
    with pytest.raises(ValueError, match=r"one calibration sample takes [\d,]+ bytes, over memory_limit_bytes=100"):
        collect(pipe, memory_limit_bytes=100)


def test_embeddings_shared_by_a_trajectory_count_once(pipe: Any) -> None:
    one, both = collect(pipe, PROMPTS[:1], samples=1), collect(pipe, PROMPTS[:1], samples=2)
    assert size_in_bytes(both) < 2 * size_in_bytes(one)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": []}, "calibration needs prompts"),
        ({"samples": 0}, "samples=0; at least one is needed"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"selection": "best"}, "unknown sample selection 'best'; choose one of uniform, density_diversity"),
        ({"colour": "red"}, "PixArtSigmaPipeline takes no argument colour"),
        ({"prompt_embeds": torch.zeros(2, 8, 128)}, "prompt_embeds has 2 rows for 3 prompts"),
    ],
)
def test_wrong_settings_are_refused(pipe: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(pipe, **kwargs)


def test_a_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="object has no transformer"):
        collect_samples(object(), ["a cat"])


# --- cache -----------------------------------------------------------------------------------------------------------


def test_cache_returns_the_same_samples_without_running(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(pipe, samples=4, cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr(collection, "_collect", lambda *a: pytest.fail("ran the pipeline"))
    again = collect(pipe, samples=4, cache_dir=tmp_path)
    assert same(first, again)
    # embeddings are still shared; only timesteps, views of the scheduler's own list, are now apart
    assert size_in_bytes(again) - size_in_bytes(first) < 100


def test_cache_notices_other_weights_prompts_and_settings(pipe: Any, tmp_path: Path) -> None:
    def key(p: Any = pipe, settings: Any = None, **call: Any) -> str:
        return sample_cache.fingerprint(p, settings or {"prompts": PROMPTS}, CALL | call)

    other = tiny_pipeline(seed=1, layers=1)
    assert key() == key()
    assert (
        len({key(), key(other), key(settings={"prompts": ["x"]}), key(guidance_scale=2.0), key(latents=torch.ones(1))})
        == 5
    )


def test_a_damaged_cache_is_reported_and_made_anew(pipe: Any, tmp_path: Path) -> None:
    first = copy.deepcopy(collect(pipe, samples=2, cache_dir=tmp_path))  # what is returned is mapped from the file
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="ignoring the damaged calibration cache"):
        assert same(collect(pipe, samples=2, cache_dir=tmp_path), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(pipe, samples=2, cache_dir=tmp_path)


@pytest.mark.parametrize("samples", [[{"constant": 1}], [{"list": []}]])
def test_a_cache_of_something_else_than_keyword_arguments_is_made_anew(
    samples: list, pipe: Any, tmp_path: Path
) -> None:
    first = collect(pipe, samples=1, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    save_file({"tensor0": torch.zeros(1)}, file, {"samples": json.dumps(samples)})
    with pytest.warns(UserWarning, match="ignoring the damaged calibration cache"):
        assert same(collect(pipe, samples=1, cache_dir=tmp_path), first)


def test_an_unwritable_cache_is_one_sentence(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot keep calibration data in"):
        collect(pipe, samples=1, cache_dir=tmp_path / "file" / "cache")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red cat\r\n\n  ein grüner Baum \n", encoding="utf-8")
    assert read_prompts(file) == ["a red cat", "ein grüner Baum"]


def test_unreadable_prompt_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no prompt file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no prompts; write one a line"):
        read_prompts(file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(file)


# --- calibrate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared() -> Any:
    graph = capture(TinyDiT(), tiny_sample())
    config = QuantConfig(activation_granularity="tensor", skip=w4a6().skip)
    return prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))


def test_calibrate_shows_every_sample_to_the_observers(prepared: Any) -> None:
    calibrate(prepared, [tiny_sample(), tiny_sample()], progress=False)
    ranges = [m.absmax for m in prepared.modules() if isinstance(m, StaticActivationObserver)]
    assert ranges
    assert all(float(x) > 0 for x in ranges)


def test_samples_that_do_not_fit_are_refused(prepared: Any) -> None:
    good = tiny_sample()
    first = next(iter(good))
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate(prepared, [])
    with pytest.raises(ValueError, match="found a single dict"):
        calibrate(prepared, good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calibration sample 1: .*unknown latents"):
        calibrate(prepared, [good, good | {"latents": None}], progress=False)
    with pytest.raises(ValueError, match=f"calibration sample 0: .*missing {first}"):
        calibrate(prepared, [{k: v for k, v in good.items() if k != first}], progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_samples_are_refused_by_name(prepared: Any, value: float) -> None:
    bad = tiny_sample()
    first = next(iter(bad))
    bad[first] = bad[first].clone()
    bad[first].view(-1)[3] = value
    with pytest.raises(ValueError, match=f"calibration sample 1: {first} of shape .* holds 1 NaN or Inf"):
        calibrate(prepared, [tiny_sample(), bad], progress=False)
