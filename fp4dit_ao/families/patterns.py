"""What families agree on, as patterns over the names of modules: what stays in high precision, and what modulates."""

import re
from fnmatch import fnmatchcase

from torch import nn

KEPT = (
    # patches and positions
    "pos_embed*", "patch_embed*", "x_embedder", "x_embedder*", "proj_in",
    # time, text and other conditions
    "adaln_single*", "caption_projection*", "time_text_embed*", "time_extra_emb*", "time_caption_embed*", "time_embedding*",
    "time_step_*", "time_embed*", "text_embedder*", "context_embedder", "condition_embedder*", "ofs_embedding*",
    "*.norm1.emb.*", "*time_text_embed*", "*timestep*", "*guidance_embed*", "*guidance_layer*",
    # what comes after the last block
    "norm_out*", "proj_out*", "final_layer*", "all_final_layer*",
    # routers of mixtures of experts, where a small error sends a token elsewhere
    "*router*", "*_mlp.gate", "*.ff_i.gate",
)  # fmt: skip
"""Globs over modules that stay in high precision in every family, beside all linears outside of numbered blocks."""

MODULATION = (
    "*.norm.linear*", "*.norm?.linear*", "*.norm?_context.linear*", "*.norm_out.linear*", "*.adaLN_modulation*",
    "*.adaln_modulation*", "*.adaln_proj*", "*.img_mod.*", "*.txt_mod.*", "*.modulation.*", "*_modulation.*",
)  # fmt: skip
"""Globs over modulation (adaLN) linears, which see one vector per image; an error there would reach every token."""


def outside_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of ``model``'s linears that stand outside of its numbered blocks and that :data:`KEPT` does not name.

    A block is a child with a number for its name and at least two linears; ``mlp.0`` and ``mlp.2`` of an embedder are
    linears, not blocks.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if _NUMBERED.search(name) and _is_block(module))
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(inside)
        and not any(fnmatchcase(name, glob) for glob in KEPT)
    )


_NUMBERED = re.compile(r"(^|\.)\d+$")


def _is_block(module: nn.Module) -> bool:
    return sum(isinstance(x, nn.Linear) for x in module.modules()) > 1
