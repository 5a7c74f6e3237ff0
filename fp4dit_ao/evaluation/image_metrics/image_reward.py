"""ImageReward: how well people would like an image for its prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, PromptMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import array, clip_image_processor, offline_first
from fp4dit_ao.evaluation.image_metrics.weight_files import layers, load_all, read_weights, renamed, weight_file

TOKENIZER = "google-bert/bert-base-uncased"
LONGEST = 35
"""Tokens of a prompt."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of rewards on the authors' test set: a reward is given in these units."""
HEAD = 64
"""Width of an attention head, in both transformers."""
_VISION = (
    (r"blip\.visual_encoder\.cls_token", "embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.*)", r"embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(.*)", r"post_layernorm.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.*)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.*)", r"encoder.layers.\1.mlp.\2"),
)
_TEXT = ((r"blip\.text_encoder\.(.*)", r"\1"),)
_HEAD = ((r"mlp\.layers\.(\d+)\.(.*)", r"\1.\2"),)


class ImageReward(PromptMetric):
    """The reward of arXiv 2304.05977, section 3: BLIP's text transformer reads the prompt and looks at the image; five linears.

    ``weights`` is the authors' file ``ImageReward.pt``; a tokenizer may lie beside it.
    """

    label = "ImageReward"
    default_weights = "THUDM/ImageReward/ImageReward.pt"

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        from transformers import AutoTokenizer

        self.backbone = ""
        path = weight_file(self.weights, "download it, and give the file: --metric image_reward=FILE")
        tensors = read_weights(path)
        if "blip.visual_encoder.cls_token" not in tensors:
            raise ValueError(f"{path} holds no weights of ImageReward: there is no blip.visual_encoder.cls_token")
        self._build(tensors, path)
        beside = (path.parent / "tokenizer_config.json").exists()
        self.tokenizer = offline_first(AutoTokenizer.from_pretrained, str(path.parent) if beside else TOKENIZER)

    def _build(self, tensors: dict[str, Tensor], path: Path) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        visual, textual = "blip.visual_encoder.", "blip.text_encoder."
        width, _, _, patch = tensors[f"{visual}patch_embed.proj.weight"].shape
        side = round((tensors[f"{visual}pos_embed"].shape[1] - 1) ** 0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, num_attention_heads=width // HEAD, patch_size=patch, image_size=side,
                num_hidden_layers=layers(tensors, f"{visual}blocks."), layer_norm_eps=1e-6,
                intermediate_size=len(tensors[f"{visual}blocks.0.mlp.fc1.weight"]),
            )
        )  # fmt: skip
        vocabulary, text_width = tensors[f"{textual}embeddings.word_embeddings.weight"].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary, hidden_size=text_width, encoder_hidden_size=width,
                num_attention_heads=text_width // HEAD, num_hidden_layers=layers(tensors, f"{textual}encoder.layer."),
                intermediate_size=len(tensors[f"{textual}encoder.layer.0.intermediate.dense.weight"]),
                max_position_embeddings=len(tensors[f"{textual}embeddings.position_embeddings.weight"]),
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        head = renamed(tensors, _HEAD)
        widths = {int(name.partition(".")[0]): value.shape for name, value in head.items() if name.endswith("weight")}
        last = max(widths)
        self.head = nn.Sequential(
            *(nn.Linear(widths[n][1], widths[n][0]) if n in widths else nn.Identity() for n in range(last + 1))
        )
        for part, rules in ((self.vision, _VISION), (self.text, _TEXT), (self.head, _HEAD)):
            load_all(part, renamed(tensors, rules), path)
            part.eval().to(self.device)
        self.processor = clip_image_processor(side)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Floats:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device), return_dict=True,
        ).last_hidden_state  # fmt: skip
        return array((self.head(read[:, 0].float())[:, 0] - MEAN) / STD)
