"""Calls of transformers at sizes of one's choice; the models are those of ``benchmarks.small_transformers``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao.families.sample_inputs import Random


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; height and width are those of the latent, which is packed in patches of two by two."""

    batch: int = 2
    height: int = 8
    width: int = 12
    text: int = 8
    frames: int = 3


def grid(*sides: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in sides))


def _time(r: Random, s: Sizes) -> Tensor:
    return (r.whole(1, 1000, s.batch) / 1000).to(r.dtype)


def _packed(r: Random, s: Sizes, axes: int = 3, channels: int = 32) -> dict[str, Any]:
    rows, columns = s.height // 2, s.width // 2
    return {
        "hidden_states": r.normal(s.batch, rows * columns, channels),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "timestep": _time(r, s),
        "img_ids": grid(1, rows, columns) if axes == 3 else grid(1, rows, columns, 1),
        "txt_ids": torch.zeros(s.text, axes),
    }


def _image(r: Random, s: Sizes, channels: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(s.batch, channels, s.height, s.width),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "timestep": r.whole(0, 1000, s.batch),
    }


def _video(r: Random, s: Sizes, channels: int = 4) -> dict[str, Any]:
    return _image(r, s) | {"hidden_states": r.normal(s.batch, channels, s.frames, s.height, s.width)}


def _joined(texts: int, s: Sizes) -> Tensor:
    """Mask of a text that fills its places in the first row only, and an image behind it."""
    mask = torch.ones(s.batch, texts + s.height // 2 * (s.width // 2))
    mask[1:, texts // 2 : texts] = 0
    return mask


def _sizes(s: Sizes) -> dict[str, Any]:
    return {"target_size": torch.full((s.batch, 2), 64.0), "crop_coords": torch.zeros(s.batch, 2)}


def _flux2(r: Random, s: Sizes) -> dict[str, Any]:
    return _packed(r, s, 4) | {
        "img_ids": grid(1, s.height // 2, s.width // 2, 1).expand(s.batch, -1, -1),
        "txt_ids": grid(1, 1, 1, s.text).expand(s.batch, -1, -1),
        "guidance": torch.full((s.batch,), 3.5),
    }


def _glm(r: Random, s: Sizes) -> dict[str, Any]:
    places = s.height // 2 * (s.width // 2)
    return _image(r, s) | _sizes(s) | {
        "prior_token_id": r.whole(0, 64, s.batch, places),
        "prior_token_drop": r.whole(0, 2, s.batch, places).bool(),
    }  # fmt: skip


def _hidream(r: Random, s: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(s.batch, 16, s.height, s.width),
        "encoder_hidden_states_t5": r.normal(s.batch, s.text, 64),
        "encoder_hidden_states_llama3": r.normal(2, s.batch, s.text + 2, 64),
        "pooled_embeds": r.normal(s.batch, 64),
        "timesteps": r.whole(0, 1000, s.batch),
    }


def _qwen(r: Random, s: Sizes) -> dict[str, Any]:
    rows, columns = s.height // 2, s.width // 2
    return {
        "hidden_states": r.normal(s.batch, rows * columns, 16),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "encoder_hidden_states_mask": r.mask(s.batch, s.text),
        "timestep": _time(r, s),
        "img_shapes": [[(1, rows, columns)]] * s.batch,
    }


def _nucleus(r: Random, s: Sizes) -> dict[str, Any]:
    return _qwen(r, s) | {"img_shapes": [(1, s.height // 2, s.width // 2)] * s.batch}


def _qwen_edit(r: Random, s: Sizes) -> dict[str, Any]:
    """A picture, and one of 2 by 3 that it is edited from."""
    call = _qwen(r, s)
    return call | {
        "hidden_states": torch.cat([call["hidden_states"], r.normal(s.batch, 6, 16)], 1),
        "img_shapes": [[(1, s.height // 2, s.width // 2), (1, 2, 3)]] * s.batch,
    }


def _qwen21(r: Random, s: Sizes) -> dict[str, Any]:
    """A reference of 2 by 2 tokens stands at the third place of the text, for which the text encoder has one place."""
    rows, columns = s.height // 2, s.width // 2
    place = torch.arange(s.text + rows * columns // 4)
    return {
        "hidden_states": r.normal(s.batch, 4 + rows * columns, 16),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "encoder_hidden_states_mask": r.mask(s.batch, s.text).bool(),
        "timestep": _time(r, s),
        "img_shapes": [[(1, 2, 2), (1, rows, columns)]] * s.batch,
        "img_mask": ((place == 2) | (place >= s.text)).expand(s.batch, -1),
    }


def _joy_plus(r: Random, s: Sizes) -> dict[str, Any]:
    """Always two rows, since ``shape_list`` has one item for each; the first has padding."""
    rows, columns = s.height // 2, s.width // 2
    shapes = [[(1, rows, columns), (1, 2, 2)], [(1, rows, columns), (1, 2, 3)]]
    return {
        "hidden_states": r.normal(2, rows * columns + 6, 16, 1, 2, 2),
        "encoder_hidden_states": r.normal(2, s.text, 64),
        "encoder_hidden_states_mask": r.mask(2, s.text),
        "timestep": r.whole(0, 1000, 2),
        "shape_list": shapes,
    }


def _omnigen(r: Random, s: Sizes) -> dict[str, Any]:
    length = s.text + 1 + s.height // 2 * (s.width // 2)
    return {
        "hidden_states": r.normal(s.batch, 4, s.height, s.width),
        "timestep": _time(r, s),
        "input_ids": r.whole(0, 64, s.batch, s.text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(s.batch, length, length).tril(),
        "position_ids": torch.arange(length).expand(s.batch, -1),
    }


def _z_image(r: Random, s: Sizes) -> dict[str, Any]:
    """One image a row, and texts of several lengths."""
    return {
        "x": [r.normal(16, 1, s.height, s.width) for _ in range(2)],
        "cap_feats": [r.normal(length, 64) for length in (s.text, 5)],
        "t": _time(r, Sizes()),
    }


def _hunyuan_video(r: Random, s: Sizes) -> dict[str, Any]:
    return _video(r, s) | {
        "pooled_projections": r.normal(s.batch, 64),
        "encoder_attention_mask": r.mask(s.batch, s.text),
        "guidance": torch.full((s.batch,), 6000.0),
    }


def _hunyuan_video15(r: Random, s: Sizes) -> dict[str, Any]:
    return _video(r, s) | {
        "timestep": _time(r, s) * 1000,
        "encoder_attention_mask": r.mask(s.batch, s.text),
        "encoder_hidden_states_2": r.normal(s.batch, 4, 64),
        "encoder_attention_mask_2": r.mask(s.batch, 4),
        "image_embeds": r.normal(s.batch, 3, 64),
    }


def _framepack(r: Random, s: Sizes) -> dict[str, Any]:
    history = {"clean": 2, "history_2x": 2, "history_4x": 16}
    return (
        _hunyuan_video(r, s)
        | {"image_embeds": r.normal(s.batch, 3, 64), "indices_latents": torch.arange(float(s.frames))}
        | {f"latents_{name}": r.normal(s.batch, 4, frames, s.height, s.width) for name, frames in history.items()}
        | {f"indices_latents_{name}": torch.arange(float(frames)) for name, frames in history.items()}
    )


def _hunyuan_image(r: Random, s: Sizes) -> dict[str, Any]:
    return _image(r, s) | {
        "timestep": _time(r, s) * 1000,
        "encoder_attention_mask": r.mask(s.batch, s.text),
        "encoder_hidden_states_2": r.normal(s.batch, 6, 64),
        "encoder_attention_mask_2": r.mask(s.batch, 6),
    }


def _wan_animate(r: Random, s: Sizes) -> dict[str, Any]:
    """Frames are three, which the five faces and the padding before them divide."""
    return _video(r, s, 12) | {
        "encoder_hidden_states_image": r.normal(s.batch, 4, 64),
        "pose_hidden_states": r.normal(s.batch, 4, s.frames - 1, s.height, s.width),
        "face_pixel_values": r.normal(s.batch, 3, 4 * (s.frames - 2) + 1, 16, 16),
    }


def _consis(r: Random, s: Sizes) -> dict[str, Any]:
    return _video(r, s) | {
        "hidden_states": r.normal(s.batch, s.frames, 4, s.height, s.width),
        "encoder_hidden_states": r.normal(s.batch, 8, 64),
        "id_vit_hidden": [r.normal(s.batch, 4, 64)],
        "id_cond": r.normal(s.batch, 64),
    }


def _sana_wm(r: Random, s: Sizes) -> dict[str, Any]:
    """A camera that turns and moves, other in each row, and a step of its own for each frame."""
    turned = torch.linalg.qr(r.normal(s.batch, s.frames, 3, 3))[0]
    last = torch.eye(4)[3:].expand(s.batch, s.frames, 1, 4)
    pose = torch.cat([torch.cat([turned, r.normal(s.batch, s.frames, 3, 1)], -1), last], -2)
    lens = torch.tensor([4.0, 5.0, s.width / 2, s.height / 2]).expand(s.batch, s.frames, 4)
    return {
        "hidden_states": r.normal(s.batch, 16, s.frames, s.height, s.width),
        "timestep": r.whole(0, 1000, s.batch, 1, s.frames),
        "encoder_hidden_states": r.normal(s.batch, 1, s.text, 64),
        "encoder_attention_mask": r.mask(s.batch, s.text),
        "camera_conditions": torch.cat([pose.flatten(2), lens], -1),
        "chunk_plucker": r.normal(s.batch, 48, s.frames, s.height, s.width),
    }


def _stable_audio(r: Random, s: Sizes) -> dict[str, Any]:
    """As many places as a picture of that size has, and the global one in front of them."""
    places = s.height * s.width
    return {
        "hidden_states": r.normal(s.batch, 32, places),
        "timestep": _time(r, s),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "global_hidden_states": r.normal(s.batch, 1, 64),
        "rotary_embedding": r.rotation(places + 1, 16),
    }


def _fibo2(r: Random, s: Sizes) -> dict[str, Any]:
    """Texts that make four to eight gist tokens, and a bundle for the one block that reads them."""
    return _image(r, s) | {"timestep": _time(r, s), "encoder_hidden_states": r.normal(s.batch, 2, s.text, 64)}


def _cosmos(r: Random, s: Sizes) -> dict[str, Any]:
    return _video(r, s) | {"fps": 30, "padding_mask": torch.zeros(1, 1, s.height, s.width)}


def _kandinsky5(r: Random, s: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(s.batch, s.frames, s.height, s.width, 16),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "timestep": r.whole(0, 1000, s.batch),
        "pooled_projections": r.normal(s.batch, 64),
        "visual_rope_pos": [torch.arange(side) for side in (s.frames, s.height // 2, s.width // 2)],
        "text_rope_pos": torch.arange(s.text),
    }


def _ltx2(r: Random, s: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(s.batch, s.frames * s.height * s.width, 32),
        "audio_hidden_states": r.normal(s.batch, 6, 32),
        "encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "audio_encoder_hidden_states": r.normal(s.batch, s.text, 64),
        "timestep": r.whole(0, 1000, s.batch),
        "encoder_attention_mask": r.mask(s.batch, s.text),
        "num_frames": s.frames,
        "height": s.height,
        "width": s.width,
        "audio_num_frames": 6,
        "fps": 25.0,
    }


def _lumina_next(r: Random, s: Sizes) -> dict[str, Any]:
    angles = r.normal(s.height, s.width, 16)
    return _image(r, s, 4) | {
        "timestep": _time(r, s),
        "encoder_mask": r.mask(s.batch, s.text),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


CALLS: dict[str, Callable[[Random, Sizes], dict[str, Any]]] = {
    "BriaFibo2Transformer2DModel": _fibo2,
    "BriaTransformer2DModel": _packed,
    "ChromaTransformer2DModel": lambda r, s: _packed(r, s) | {"attention_mask": _joined(s.text, s)},
    "CogView4Transformer2DModel": lambda r, s: _image(r, s) | _sizes(s) | {"original_size": torch.full((s.batch, 2), 64.0)},
    "ConsisIDTransformer3DModel": _consis,
    "CosmosTransformer3DModel": _cosmos,
    "Flux2Transformer2DModel": _flux2,
    "GlmImageTransformer2DModel": _glm,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video15,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "JoyImageEditPlusTransformer3DModel": _joy_plus,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "LongCatImageTransformer2DModel": _packed,
    "LTX2VideoTransformer3DModel": _ltx2,
    "LuminaNextDiT2DModel": _lumina_next,
    "MochiTransformer3DModel": lambda r, s: _video(r, s) | {"encoder_attention_mask": r.mask(s.batch, s.text).bool()},
    "NucleusMoEImageTransformer2DModel": _nucleus,
    "OmniGenTransformer2DModel": _omnigen,
    "OvisImageTransformer2DModel": _packed,
    "QwenImage21Transformer2DModel": _qwen21,
    "QwenImageTransformer2DModel": _qwen,
    "SanaWMTransformer3DModel": _sana_wm,
    "SkyReelsV2Transformer3DModel": _video,
    "StableAudioDiTModel": _stable_audio,
    "WanAnimateTransformer3DModel": _wan_animate,
    "WanVACETransformer3DModel": lambda r, s: _video(r, s) | {
        "control_hidden_states": r.normal(s.batch, 12, s.frames, s.height, s.width)
    },
    "ZImageTransformer2DModel": _z_image,
}  # fmt: skip
"""Makes keyword arguments of ``forward``, by class."""
