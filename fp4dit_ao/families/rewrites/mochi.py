"""Rewritten methods of Mochi."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.families.rewrites.masked_tokens import used_first

if TYPE_CHECKING:
    from diffusers.models.attention_processor import MochiAttention
    from diffusers.models.transformers.transformer_mochi import MochiRoPE


def mochi_attention(
    self: "MochiAttention",
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``MochiAttention.forward``, whose processor attends row by row to the words that the row's mask leaves, and
    fills the places behind them with zeros.

    Here words that are masked stand behind the others, are no keys, and get zeros.
    """
    words, is_used = used_first(encoder_hidden_states, attention_mask.bool())
    q, k, v = (_heads(project(hidden_states), self.heads) for project in (self.to_q, self.to_k, self.to_v))
    word_q, word_k, word_v = (
        _heads(project(words), self.heads) for project in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
    )
    q, k = self.norm_q(q), self.norm_k(k)
    word_q, word_k = self.norm_added_q(word_q), self.norm_added_k(word_k)
    if image_rotary_emb is not None:
        q, k = _rotated(q, *image_rotary_emb), _rotated(k, *image_rotary_emb)

    pairs = ((q, word_q), (k, word_k), (v, word_v))
    query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
    is_key = torch.cat([is_used.new_ones(q.shape[:2]), is_used], dim=1)
    y = F.scaled_dot_product_attention(query, key, value, is_key[:, None, None, :])
    image, text = y.transpose(1, 2).flatten(2, 3).split_with_sizes((q.shape[1], words.shape[1]), dim=1)
    text = torch.where(is_used[..., None], text, 0.0)
    image = self.to_out[1](self.to_out[0](image))
    return image, self.to_add_out(text) if hasattr(self, "to_add_out") else text


def mochi_positions(
    self: "MochiRoPE",
    num_frames: int,
    height: int,
    width: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replaces ``MochiRoPE._get_positions``, whose ``linspace`` makes constants of the sizes that a graph is captured with.

    The middles between ``side + 1`` edges from ``-side * scale / 2`` on, ``scale`` apart.
    """
    area = torch.full((), height * width, dtype=torch.float64, device=device)
    scale = (self.target_area / area).sqrt()

    def centers(side: int) -> Tensor:
        places = torch.arange(side, dtype=torch.float64, device=device)
        return ((places + (0.5 - side / 2)) * scale).to(dtype or torch.get_default_dtype())

    frames = torch.arange(num_frames, device=device, dtype=dtype)
    return torch.stack(torch.meshgrid(frames, centers(height), centers(width), indexing="ij"), dim=-1).view(-1, 3)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], dim=-1).flatten(-2)
