"""Transformers whose own code cannot be recorded as a graph for every size, in diffusers' own classes at small width."""

import copy
import functools
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import relative
from benchmarks.small_transformers import SMALL_TRANSFORMERS, randomize
from fp4dit_ao import QuantizedTransformer, capture, lower, quantizer_for
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.families.rewrites import REWRITES, methods_replaced, sana_wm
from fp4dit_ao.families.sample_inputs import Random
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from tests.families.sized_calls import CALLS, Sizes

REWRITTEN = (
    "BriaFibo2Transformer2DModel",
    "ChromaTransformer2DModel", "ConsisIDTransformer3DModel", "CosmosTransformer3DModel", "GlmImageTransformer2DModel",
    "HiDreamImageTransformer2DModel", "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel", "JoyImageEditPlusTransformer3DModel", "LuminaNextDiT2DModel",
    "MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel", "OmniGenTransformer2DModel", "QwenImageTransformer2DModel",
    "QwenImage21Transformer2DModel", "SanaWMTransformer3DModel", "WanAnimateTransformer3DModel", "ZImageTransformer2DModel",
)  # fmt: skip
OTHERS = (Sizes(), Sizes(3, 12, 8, 7, 4), Sizes(2, 16, 16, 33, 4))
"""Sizes that are not captured: several pictures; taller than wide, longer and of fewer words; square, and of more words."""
CAPTURED = (
    *(kind for kind in REWRITTEN if kind.startswith(
        ("BriaFibo2", "Chroma", "Glm", "HiDream", "HunyuanVideo15", "LuminaNext", "Mochi", "Nucleus", "QwenImageT", "SanaWM",
         "WanAnimate", "ZImage")
    )),
    *(kind for kind in CALLS if kind not in REWRITTEN),
)  # fmt: skip
"""Rewritten ones that are asked for most, and one of each kind of rewrite, since a capture takes its time; and those of many
sizes that need no rewrite."""
CONFIGS = {
    "HiDreamImageTransformer2DModel": {"num_routed_experts": 4},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [2.0] * 16, "short_factor": [1.0] * 16},
        "original_max_position_embeddings": 40,
    },
}
"""What differs from the small models: more experts than each token has, and a length that some sizes exceed."""
BOUNDS = {"SanaWMTransformer3DModel": 1e-3}
"""Differences, relative to the largest output, that are more than float32's: SANA-WM's softmax attention rounds float32 to
bfloat16, so that a last bit may become one of 2^-9."""


@functools.cache
def small(kind: str) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    model = randomize(getattr(diffusers, kind)(**SMALL_TRANSFORMERS[kind].config | CONFIGS.get(kind, {})))
    for module in model.modules():
        if type(module).__name__ == "SanaWMTemporalShortConvolution":  # made of zeros: all keys would be, too
            nn.init.normal_(module.weight)
    return model


@functools.cache
def graph(kind: str) -> torch.fx.GraphModule:
    return capture(small(kind), call(kind, Sizes(batch=1)))


def call(kind: str, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    return CALLS[kind](Random(seed, torch.float32), sizes)


def output(found: Any) -> Tensor:
    """The output of a model, which for Z-Image is a list of images."""
    return torch.cat([x.flatten() for x in found[0]]) if isinstance(found[0], list) else found[0]


@torch.no_grad()
def expected(kind: str, sample: dict[str, Any]) -> Tensor:
    return output(small(kind)(**sample, return_dict=False))


@pytest.mark.parametrize("kind", REWRITTEN)
@torch.no_grad()
def test_rewritten_methods_return_what_the_originals_do(kind) -> None:
    for seed, sizes in enumerate((Sizes(batch=1), *OTHERS)):
        original = expected(kind, call(kind, sizes, seed))
        with methods_replaced(small(kind), REWRITES):
            found = expected(kind, call(kind, sizes, seed))
        # equal but for sums in another order: of attention, where one prompt is masked instead of cut; of experts
        assert (found - original).abs().max() <= BOUNDS.get(kind, 1e-5) * original.abs().max(), sizes


@pytest.mark.parametrize("kind", CAPTURED)
@torch.no_grad()
def test_captured_with_one_picture_and_equal_at_all_sizes(kind) -> None:
    for seed, sizes in enumerate((Sizes(batch=1), *OTHERS)):
        original = expected(kind, call(kind, sizes, seed))
        found = output(graph(kind)(**call(kind, sizes, seed)))
        assert found.shape == original.shape, sizes
        assert (found - original).abs().max() <= BOUNDS.get(kind, 1e-5) * original.abs().max(), sizes


@functools.cache
@torch.no_grad()
def quantized(kind: str) -> QuantizedTransformer:
    model = small(kind)
    quantizer = quantizer_for(model, "w4a6")
    lowered = lower(convert_pt2e(prepare_pt2e(copy.deepcopy(graph(kind)), quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    description = sample_description.describe(bind(model, call(kind, Sizes(batch=1))))
    return QuantizedTransformer(lowered, model, description, decisions)


@pytest.mark.parametrize("kind", [kind for kind in CAPTURED if "HiDream" in kind or "15" in kind or "Qwen" in kind])
@torch.no_grad()
def test_quantized_close_and_the_same_after_loading(kind, tmp_path) -> None:
    quantized(kind).save_pretrained(tmp_path)
    loaded = QuantizedTransformer.from_pretrained(tmp_path)
    for seed, sizes in enumerate(OTHERS[:2]):
        original = expected(kind, call(kind, sizes, seed))
        found = quantized(kind)(**call(kind, sizes, seed)).sample
        assert 0 < relative(found, original) < 0.35, sizes
        assert torch.equal(loaded(**call(kind, sizes, seed)).sample, found), sizes


def test_an_attention_scale_made_of_sizes_is_refused() -> None:
    """As Lumina-Next's pipeline calls it by default: its scale is a logarithm of the number of tokens."""
    kind = "LuminaNextDiT2DModel"
    sample = call(kind, Sizes()) | {"cross_attention_kwargs": {"base_sequence_length": 64}}
    with pytest.raises(ValueError, match=r"^base_sequence_length scales attention .*proportional_attn=False"):
        capture(small(kind), sample)


# --- what masks and branches depend on ---------------------------------------------------------------------------------


@torch.no_grad()
def test_hunyuan_video_with_and_without_an_image() -> None:
    kind = "HunyuanVideo15Transformer3DModel"
    for image in (0.0, 1.0):
        sample = call(kind, Sizes())
        sample["image_embeds"] = sample["image_embeds"] * image
        sample["encoder_attention_mask"][0] = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1])  # not only at its end
        original = expected(kind, sample)
        assert (output(graph(kind)(**sample)) - original).abs().max() <= 1e-5 * original.abs().max()


@torch.no_grad()
def test_bria_fibo2_with_padded_prompts_and_pictures_to_edit() -> None:
    """A prompt of 13 words has eight gist tokens here, one of 3 has four, and a picture has a size of its own."""
    kind = "BriaFibo2Transformer2DModel"
    for lengths in ([13, 3], [9, 16]):
        sample = call(kind, Sizes(text=16))
        sample["encoder_attention_mask"] = torch.arange(16) < torch.tensor(lengths)[:, None]
        sample["context_latents"] = [torch.randn(2, 16, 4, 6), torch.randn(2, 16, 8, 8)]
        original = expected(kind, sample)
        with methods_replaced(small(kind), REWRITES):
            found = expected(kind, sample)
        assert (found - original).abs().max() <= 1e-5 * original.abs().max()


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 33])
def test_states_of_any_number_of_frames_are_those_of_a_loop(frames: int) -> None:
    torch.manual_seed(0)
    transitions, updates = (torch.randn(2, frames, n, 4, dtype=torch.float64) / 2 for n in (4, 3))
    state, states = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(frames):
        state = state @ transitions[:, t] + updates[:, t]
        states.append(state)
    found = sana_wm.running_states(transitions.flatten(0, 1), updates.flatten(0, 1), frames)
    torch.testing.assert_close(found.unflatten(0, (2, frames)), torch.stack(states, 1), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_hidream_draws_squares_and_what_is_none() -> None:
    """diffusers pads what is no square to the greatest length, and attends to the padding."""
    kind = "HiDreamImageTransformer2DModel"
    for height, width in ((8, 8), (8, 12), (32, 32), (12, 8)):
        sample = call(kind, Sizes(height=height, width=width))
        original = expected(kind, sample)
        assert (output(graph(kind)(**sample)) - original).abs().max() <= 1e-5 * original.abs().max()


@torch.no_grad()
def test_z_image_with_texts_and_pictures_that_need_no_padding() -> None:
    kind = "ZImageTransformer2DModel"
    for text in (32, 5, 64):  # multiples of 32 are not padded; rows of equal length have no mask in diffusers
        sample = call(kind, Sizes(height=8, width=16, text=text))
        original = expected(kind, sample)
        assert (output(graph(kind)(**sample)) - original).abs().max() <= 1e-5 * original.abs().max()


@torch.no_grad()
def test_qwen_image_edits() -> None:
    """With a reference whose tokens have a time of their own, and a text whose positions follow the larger side."""
    model = randomize(type(small("QwenImageTransformer2DModel"))(
        **SMALL_TRANSFORMERS["QwenImageTransformer2DModel"].config | {"zero_cond_t": True}
    ))  # fmt: skip

    def edit(sizes: Sizes, seed: int) -> dict[str, Any]:
        sample = call("QwenImageTransformer2DModel", sizes, seed)
        reference = torch.randn(sizes.batch, 6, 16, generator=torch.Generator().manual_seed(seed))
        return sample | {
            "hidden_states": torch.cat([sample["hidden_states"], reference], 1),
            "img_shapes": [[*shapes, (1, 2, 3)] for shapes in sample["img_shapes"]],
        }

    captured = capture(model, edit(Sizes(), 0))
    for seed, sizes in enumerate(OTHERS[1:]):
        assert torch.equal(captured(**edit(sizes, seed))[0], model(**edit(sizes, seed), return_dict=False)[0])


# --- calls -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_numbers_in_lists_vary_and_what_rows_share_is_given_once() -> None:
    kind = "QwenImageTransformer2DModel"
    sample = call(kind, OTHERS[1])
    assert len(sample["img_shapes"]) == 3
    assert quantized(kind)(**sample).sample.shape == sample["hidden_states"].shape
    with pytest.raises(ValueError, match=r"img_shapes\[0\]\[0\]\[0\] is fixed to 1, found 2"):
        quantized(kind)(**sample | {"img_shapes": [[(2, 3, 4)]]})
    with pytest.raises(ValueError, match="img_shapes differs from row to row"):
        quantized(kind)(**sample | {"img_shapes": [[(1, 6, 4)], [(1, 4, 6)], [(1, 6, 4)]]})


@torch.no_grad()
def test_caches_that_hold_nothing_are_left_out_and_others_refused() -> None:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    kind, caches = "GlmImageTransformer2DModel", GlmImageKVCache(1)
    sample = call(kind, Sizes(batch=1)) | {"kv_caches": caches}
    assert bind(small(kind), sample)["kv_caches"] is None
    caches.set_mode("skip")
    assert bind(small(kind), sample)["kv_caches"] is None
    caches.set_mode("read")
    with pytest.raises(ValueError, match=r"kv_caches holds keys .* quantize_modules"):
        capture(small(kind), sample)


def test_what_no_graph_takes_is_refused_with_the_form_that_does() -> None:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cases = {
        "AnyFlowFARTransformer3DModel": {},
        "QwenImage21Transformer2DModel": call("QwenImage21Transformer2DModel", Sizes())
        | {"kv_cache": QwenImage21KVCache(1)},
        "WanAnimate2Transformer3DModel": {},
        "ZImageTransformer2DModel": call("ZImageTransformer2DModel", Sizes()) | {"x": [[torch.ones(16, 1, 8, 8)]] * 2},
    }
    for kind, sample in cases.items():
        sample = sample or SMALL_TRANSFORMERS[kind].inputs(Random(0, torch.float32))
        with pytest.raises(ValueError, match=r"graph cannot.* module form: quantize_modules\(pipe\.transformer\)"):
            capture(small(kind), sample)


def test_a_failure_of_export_names_the_form_that_works() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, options: Any = None) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    class OfDiffusers(Branches):
        config = MappingProxyType[str, object]({})

    with pytest.raises(
        ValueError, match=r"Branches cannot be captured as a graph .*torch\.export\.export\(model, \(\), sample\)"
    ):
        capture(Branches(), {"x": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"OfDiffusers cannot be captured as a graph .*quantize_modules\(model\)"):
        capture(OfDiffusers(), {"x": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="options of Branches holds a SimpleNamespace, which a graph cannot take"):
        capture(Branches(), {"x": torch.ones(2, 3), "options": SimpleNamespace()})
