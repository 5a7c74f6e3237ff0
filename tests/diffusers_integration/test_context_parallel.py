"""diffusers' context parallelism of the module form: two processes with half of the tokens each give one's result."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dit_ao import quantize_modules
from tests.processes import in_processes

RECIPES = ("w4a6_codebook", "w4a6")
"""Linears with quantized tokens; the same, and quantized attention."""


def flux(recipe: str) -> Any:
    """Two heads, one for each process."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=64,
        pooled_projection_dim=64, in_channels=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return quantize_modules(model.eval(), recipe)


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator), "timestep": torch.tensor([0.5]),
        "img_ids": torch.randint(0, 4, (16, 3), generator=generator).float(), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    found: Tensor = model(**inputs(), return_dict=False)[0]
    return found


def process(rank: int) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: (
        1
    )  # by which diffusers divides a rank; without an accelerator there is none
    for recipe in RECIPES:
        model = flux(recipe)
        alone, tokens = output(model), list[int]()
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        model.transformer_blocks[0].ff.register_forward_pre_hook(
            lambda m, args, seen=tokens: seen.append(args[0].shape[1])
        )
        together = output(model)
        assert tokens == [8], "half of the image's tokens"
        # products of fewer tokens are summed otherwise in float32; where a value lies between two levels, it may take the other
        assert (together - alone).norm() < 1e-3 * alone.norm(), recipe


def test_two_processes_with_half_of_the_tokens_give_the_result_of_one() -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "ContextParallelConfig"):
        pytest.skip("this diffusers has no context parallelism")
    in_processes(process)
