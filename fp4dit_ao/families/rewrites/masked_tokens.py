"""Order of a row's tokens by its mask: what stands for tensors that are cut by masks."""

import torch
from torch import Tensor


def used_first(tokens: Tensor, is_used: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the tokens of each row that are not used behind those that are, and the mask with them; else the order
    stays."""
    order = torch.argsort((~is_used).int(), dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1])), is_used.gather(1, order)
