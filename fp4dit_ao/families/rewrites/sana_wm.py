"""Rewritten functions and methods of SANA-WM."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sana_wm import GLUMBConvTemp

MOST_FRAMES = 1024
"""Frames that the model has positions for."""


def gated_convolutions(self: "GLUMBConvTemp", hidden_states: Tensor, HW: tuple[int, int, int]) -> Tensor:
    """Replaces ``GLUMBConvTemp.forward``, which calls its convolutions with some frames at a time, as often as the batch has
    them.

    Here all frames are one batch.
    """
    frames, height, width = HW
    batch, length, channels = hidden_states.shape
    x = hidden_states.reshape(batch * frames, height, width, channels).permute(0, 3, 1, 2)
    value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
    x = self.point_conv(value * self.glu_act(gate))
    x = x.reshape(batch, frames, channels, height * width).transpose(1, 2)
    x = x + self.t_conv(x)
    return x.permute(0, 2, 3, 1).reshape(batch, length, channels)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rot: Tensor,
    k_rot: Tensor,
    beta: Tensor,
    decay: Tensor,
    recall_gate: Tensor | None = None,
    chunk_size: int | None = None,
    eps: float = 1e-6,
    return_components: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Replaces ``torch_chunk_sana_gdn``, a Python loop over frames, by :func:`camera_delta_rule`.

    The denominator is the same rule without rotation, for values that are one.
    """
    numerator = camera_delta_rule(q_rot, k_rot, v, beta, decay)
    denominator = camera_delta_rule(q, k, torch.ones_like(v[:, :, :1]), beta, decay)
    return (numerator, denominator) if return_components else numerator / (denominator + eps)


def camera_delta_rule(
    q_rot: Tensor, k_rot: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Replaces ``torch_chunk_cam_single_path_delta_rule``, a Python loop over frames, which is captured for as many as the
    example has.

    Here the frames' states come from :func:`running_states`. Tensors are (batch, heads, channels, frames * places); ``beta``
    is (batch, heads, frames, places) or (batch, heads, frames), and ``decay`` (batch, heads, frames).
    """
    frames = beta.shape[2]
    q, k, v = (x.unflatten(-1, (frames, -1)).transpose(2, 3) for x in (q_rot, k_rot, v))
    gain = beta[:, :, :, None] if beta.ndim == 4 else beta[..., None, None]
    identity = torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
    keys = k.transpose(-1, -2)
    transitions, updates = decay[..., None, None] * (identity - (k * gain) @ keys), (v * gain) @ keys
    states = running_states(transitions.flatten(0, 2), updates.flatten(0, 2), frames)
    return (states.unflatten(0, q.shape[:3]) @ q).transpose(2, 3).flatten(3)


def running_states(transitions: Tensor, updates: Tensor, frames: int) -> Tensor:
    """States ``S[t] = S[t - 1] @ transitions[t] + updates[t]`` of every frame ``t``, with ``S[-1] = 0``.

    Any number of frames up to :data:`MOST_FRAMES` takes the same steps: in each, what two spans of frames do one after the
    other becomes the transition and the update of one span, twice as long.

    Args:
        transitions: (sequences * frames, channels, channels).
        updates: (sequences * frames, rows, channels).
        frames: of a sequence.
    """
    index = torch.arange(updates.shape[0], device=updates.device)
    place = index % frames
    span = 1
    while span < MOST_FRAMES:
        before = (index - span).clamp(min=0)
        is_preceded = (place >= span)[:, None, None]
        earlier = torch.bmm(updates[before], transitions)
        updates = torch.where(is_preceded, earlier + updates, updates)
        transitions = torch.where(is_preceded, torch.bmm(transitions[before], transitions), transitions)
        span *= 2
    return updates


def pixels(
    height: int,
    width: int,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Replaces ``create_grid``, whose ``linspace`` makes constants of the sizes that a graph is captured with."""
    rows, columns = (torch.arange(side, dtype=dtype, device=device) for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)], dim=2)
    return grid if batch is None else grid.expand(batch, *grid.shape)
