"""Small models that denoise sound, and one that denoises molecules."""

from typing import Any

import torch

from benchmarks.small_transformers.entry import WIDE, Small, fraction
from fp4dit_ao.families.sample_inputs import Random


def _ace_step(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 8, 16),
        "timestep": fraction(r),
        "timestep_r": fraction(r),
        "encoder_hidden_states": r.normal(2, 10, 64),
        "context_latents": r.normal(2, 8, 32),
    }


def _longcat(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 32),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "encoder_attention_mask": r.mask(2, 8).bool(),
        "attention_mask": torch.ones(2, 16, dtype=torch.bool),
        "timestep": fraction(r),
    }


def _stable(r: Random) -> dict[str, Any]:
    """Rotary positions of 16 places and the global one in front of them, on half of a head's channels."""
    return {
        "hidden_states": r.normal(2, 32, 16),
        "timestep": fraction(r),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "global_hidden_states": r.normal(2, 1, 64),
        "rotary_embedding": r.rotation(17, 16),
    }


def _proteina(r: Random) -> dict[str, Any]:
    every = torch.ones(2, 12, dtype=torch.bool)
    return {
        "bb_ca": r.normal(2, 12, 3),
        "local_latents": r.normal(2, 12, 32),
        "bb_ca_time": fraction(r),
        "local_latents_time": fraction(r),
        "padding_mask": every,
        "conditioning": {"is_in_context_conditioning": ~every, "supports_local_latent": every},
    }


AUDIO: dict[str, Small] = {
    "AceStepTransformer1DModel": Small({
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "in_channels": 48, "audio_acoustic_hidden_dim": 16, "sliding_window": 16,
    }, _ace_step),
    "LongCatAudioDiTTransformer": Small({
        "dit_dim": 64, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 64, "latent_dim": 32, "text_conv": False,
    }, _longcat),
    "MiniMaxMusic3Transformer1DModel": Small(WIDE | {
        "in_channels": 16, "condition_dim": 64, "num_layers": 1, "ff_inner_dim": 128, "rotary_dim": 16,
        "fourier_embedding_dim": 64,
    }, lambda r: {
        "hidden_states": r.normal(2, 16, 24), "encoder_hidden_states": r.normal(2, 24, 64), "timestep": fraction(r),
    }),
    "RFD4ProteinaTransformer": Small({
        "nlayers": 2, "token_dim": 64, "nheads": 2, "dim_cond": 64, "pair_repr_dim": 32, "t_emb_dim": 64, "tri_mult_c": 32,
        "feats_seq": ("xt_bb_ca", "xt_local_latents"), "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
        "feats_pair_repr": ("xt_bb_ca_pair_dists",),
    }, _proteina),
    "StableAudioDiTModel": Small(WIDE | {
        "in_channels": 32, "out_channels": 32, "num_layers": 1, "num_key_value_attention_heads": 1, "cross_attention_dim": 64,
        "time_proj_dim": 64, "global_states_input_dim": 64, "cross_attention_input_dim": 64,
    }, _stable),
    "StableAudio3DiTModel": Small({
        "io_channels": 32, "embed_dim": 64, "depth": 1, "num_heads": 2, "cond_token_dim": 64, "global_cond_dim": 64,
        "local_add_cond_dim": 32, "timestep_features_dim": 64, "ff_mult": 2, "num_memory_tokens": 4,
    }, lambda r: {
        "hidden_states": r.normal(2, 32, 16), "timestep": fraction(r), "encoder_hidden_states": r.normal(2, 8, 64),
        "global_hidden_states": r.normal(2, 64),
    }),
}  # fmt: skip
"""Small models by the name of their class."""
