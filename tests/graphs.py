"""A small DiT block, and a compact way to print an aten graph, for tests that pin graph rewrites."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Modulated layer norm, self-attention, modulated layer norm, feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x) + shift)
        return x + self.ff(self.norm(x) + shift)


class TinyDiT(nn.Module):
    """``layers`` blocks between a patch embedding that recipes skip and a final projection that they skip too."""

    def __init__(self, width: int = 128, heads: int = 2, layers: int = 1, channels: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.pos_embedder = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(layers))
        self.proj_out = nn.Linear(width, channels)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, hidden_states: Tensor, shift: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.pos_embedder(hidden_states)
        for block in self.blocks:
            x = block(x, shift)
        return (self.proj_out(x),)


def tiny_sample(
    batch: int = 2, tokens: int = 6, width: int = 128, channels: int = 4, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, channels, generator=generator)
    return {"hidden_states": hidden, "shift": torch.randn(batch, 1, width, generator=generator)}


def show(graph: GraphModule) -> str:
    """One line a node: ``name = operator(arguments)``; sizes that export numbers anew each time are left out."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        target = str(node.target).replace("aten.", "").replace(".default", "")
        args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        if node.op == "get_attr":
            lines.append(f"{node.name} = self.{node.target}")
        elif node.op == "output":
            lines.append(f"return {args}")
        else:
            lines.append(f"{node.name} = {target}({args})")
    return "\n".join(lines)
