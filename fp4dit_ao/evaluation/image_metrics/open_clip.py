"""Weights of open_clip in transformers' CLIP."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fp4dit_ao.evaluation.image_metrics.weight_files import layers, load_all, read_weights

if TYPE_CHECKING:
    from transformers import CLIPModel

IMAGE_HEAD, TEXT_HEAD = 80, 64
"""Width of an attention head in the image and the text half of ViT-H-14."""
_NAMES = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
)  # fmt: skip
_IN_LAYERS = (
    (r"\.ln_([12])\.", r".layer_norm\1."), (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)  # fmt: skip


def read_open_clip(path: Path, image_head: int = IMAGE_HEAD, text_head: int = TEXT_HEAD) -> "CLIPModel":
    """A checkpoint of open_clip's ViT models, such as HPSv2's, as model of transformers; sizes follow from its shapes.

    Args:
        path: the file.
        image_head: width of an attention head in the image half.
        text_head: the same for the text half.

    Raises:
        ValueError: it holds other weights.
    """
    from transformers import CLIPConfig, CLIPModel

    tensors = read_weights(path)
    if "visual.conv1.weight" not in tensors:
        raise ValueError(f"{path} holds no weights of open_clip: there is no visual.conv1.weight")
    width, _, _, patch = tensors["visual.conv1.weight"].shape
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5) * patch
    vision = {
        "hidden_size": width, "num_attention_heads": width // image_head, "patch_size": patch, "image_size": side,
        "num_hidden_layers": layers(tensors, "visual.transformer.resblocks."),
        "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "num_attention_heads": text_width // text_head, "vocab_size": vocabulary,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "num_hidden_layers": layers(tensors, "transformer.resblocks."),
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "eos_token_id": 2,  # transformers' sign for "the token with the largest number", as open_clip has it
    }  # fmt: skip
    halves = {half: values | {"hidden_act": "gelu"} for half, values in (("vision", vision), ("text", text))}
    config = CLIPConfig(
        text_config=halves["text"], vision_config=halves["vision"], projection_dim=tensors["text_projection"].shape[1]
    )
    model = CLIPModel(config)
    load_all(model, _named(tensors), path)
    return model.eval()


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "visual_projection.weight": tensors["visual.proj"].T,
        "text_projection.weight": tensors["text_projection"].T,
        "logit_scale": tensors["logit_scale"],
    }
    for name, value in tensors.items():
        for pattern, replacement in _NAMES:
            if re.match(pattern, name):
                ours = re.sub(pattern, replacement, name, count=1)
                for inner, other in _IN_LAYERS:
                    ours = re.sub(inner, other, ours)
                if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", ours):
                    for part, of_part in zip("qkv", value.chunk(3), strict=True):
                        found[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = of_part
                else:
                    found[ours] = value
                break
    return found
