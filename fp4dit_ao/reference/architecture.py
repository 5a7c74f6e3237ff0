"""Untrained parts of the reference pipeline: autoencoder, transformer, text encoder, tokenizer and scheduler."""

import json
import math
from collections import Counter
from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

from fp4dit_ao.reference.data import Emoji

TEXT_LENGTH = 16
"""Tokens of a prompt, padding included."""

GENERATION: dict[str, object] = {
    "num_inference_steps": 20, "guidance_scale": 1.5, "height": 64, "width": 64, "use_resolution_binning": False,
    "max_sequence_length": TEXT_LENGTH, "clean_caption": False,
}  # fmt: skip
"""Default call arguments of the trained pipeline, written beside it as ``generation.json``."""


def build_autoencoder() -> AutoencoderKL:
    """Autoencoder of three levels: 64 px to 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64, norm_num_groups=16, layers_per_block=1,
        block_out_channels=(32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def build_transformer() -> PixArtTransformer2DModel:
    """Transformer of 7 M parameters; inputs of all linears are multiples of 128 wide, the group size of the paper's
    weights."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=6,
        cross_attention_dim=256, sample_size=16, patch_size=2, caption_channels=256, use_additional_conditions=False,
    )  # fmt: skip
    initialize(model)
    return model


def initialize(model: PixArtTransformer2DModel, gain: float = 1.0) -> None:
    """Fills the weights from normal distributions, ``gain`` times as wide as keeps variances; adaLN and every output
    projection that adds text or makes the picture from zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain * math.sqrt(2 / (module.in_features + module.out_features)))
            nn.init.zeros_(module.bias)
    patch: nn.Conv2d = model.pos_embed.proj
    nn.init.normal_(patch.weight, std=math.sqrt(1 / patch.weight[0].numel()))
    assert patch.bias is not None
    nn.init.zeros_(patch.bias)
    closed = [model.adaln_single.linear, model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)]
    for linear in closed:
        nn.init.zeros_(linear.weight)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """T5 text encoder of two layers, as wide as the transformer."""
    config = T5Config(
        vocab_size=vocabulary, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Unigram tokenizer trained on the emoji names, in T5's own wrapper (pad 0, end 1, unknown 2)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    scores: dict[str, float] = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    # the trainer splits words such as "monkey" for lack of text, so every whole word is added as a piece
    words = Counter(word for text in texts for word in text.lower().split())
    for word, count in sorted(words.items()):
        scores["▁" + word] = math.log(count / words.total())
    return T5TokenizerFast(vocab=list(scores.items()), extra_ids=0, model_max_length=TEXT_LENGTH)


def load_tokenizer(work: Path, emoji: list[Emoji]) -> PreTrainedTokenizerFast:
    """Tokenizer of a training run: built once, then read back, so that its ids do not depend on library versions."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        build_tokenizer([item.name for item in emoji] + [item.alias for item in emoji]).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = T5TokenizerFast.from_pretrained(folder)
    return tokenizer


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order, as in PixArt-Σ; training uses the same noise levels."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="v_prediction", algorithm_type="dpmsolver++", solver_order=2,
    )  # fmt: skip


class TextToLatent(nn.Module):
    """Text encoder and transformer in one module, so that they train together."""

    def __init__(self, text_encoder: T5EncoderModel, transformer: PixArtTransformer2DModel):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Predicts v (or what the scheduler's ``prediction_type`` says) from noisy latents ``(n, c, h, w)``, timesteps
        ``(n,)``, token ids and their mask ``(n, text length)``."""
        text = self.text_encoder(ids, attention_mask=mask)[0]
        output: Tensor = self.transformer(
            noisy, encoder_hidden_states=text, timestep=timestep, encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return output


def build_model(vocabulary: int) -> TextToLatent:
    """Untrained text encoder and transformer."""
    return TextToLatent(build_text_encoder(vocabulary), build_transformer())
