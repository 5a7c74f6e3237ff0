"""Rewritten methods of mixtures of experts, which send every token to some of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU, MoEGate
    from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts


def hidream_router(self: "MoEGate", hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
    """Replaces ``MoEGate.forward``, which a graph would record as a linear and quantize, so that tokens went to other
    experts: its weight is no ``nn.Linear``'s, and stays as it is in the module form."""
    scores = (hidden_states.flatten(0, 1) @ self.weight.t()).softmax(-1)
    weight, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
    if self.top_k > 1 and self.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return index, weight, None


def hidream_experts(
    self: "MOEFeedForwardSwiGLU", x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor
) -> Tensor:
    """Replaces ``MOEFeedForwardSwiGLU.moe_infer``, which sorts tokens by expert, and reads from the result how many each
    expert has.

    Here every expert computes all tokens, and those that are not its own are left out of the sum. That is as many times
    the work as there are experts for each that a token is sent to: twice in HiDream-I1, with two of four.
    """
    index = flat_expert_indices.unflatten(0, (-1, self.num_activated_experts))
    weight = flat_expert_weights.view(index.shape)
    total = torch.zeros_like(x)
    for i, expert in enumerate(self.experts):
        is_own = index == i
        share = torch.where(is_own, weight, 0.0).sum(1, keepdim=True)
        total = total + torch.where(is_own.any(1, keepdim=True), expert(x) * share, 0.0)
    return total


def nucleus_experts(self: "SwiGLUExperts", x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """Replaces ``SwiGLUExperts.forward``, which reads from a tensor how many tokens each expert has.

    Here all have equally many, as they do in ``NucleusMoELayer``, the only caller: there experts choose tokens.
    """
    gate, up = torch.bmm(x.unflatten(0, (self.num_experts, -1)), self.gate_up_proj).chunk(2, -1)
    return torch.bmm(F.silu(gate) * up, self.down_proj).flatten(0, 1)
