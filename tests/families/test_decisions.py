"""What becomes of each linear of the table's families: pinned layer by layer, whatever the rules are written like."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from torch import nn

from benchmarks.families import SMALL, small_model
from fp4dit_ao import QuantConfig, quantizer_for
from fp4dit_ao.quantizer import fit_group

PINNED = json.loads(Path(__file__).with_name("decisions.json").read_text(encoding="utf-8"))
"""By model: the linears that share one decision; a decision is the config under ``w4a6``, ``w4a6_codebook`` and ``mxfp4``."""


def decided(model: nn.Module) -> dict[str, list[str]]:
    """Decisions in the way of :data:`PINNED`."""
    configs: dict[str, list[str]] = defaultdict(list)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for recipe in ("w4a6", "w4a6_codebook", "mxfp4"):
        quantizer = quantizer_for(model, recipe)
        for name, module in linears.items():
            config, reason = quantizer.config_for(name)
            if config is not None:
                config, _ = fit_group(name, module.in_features, config, reason)
            configs[name].append("kept" if config is None else brief(config))
    found: dict[str, list[str]] = defaultdict(list)
    for name, rows in configs.items():
        found["kept" if set(rows) == {"kept"} else " | ".join(rows)].append(name)
    return dict(found)


def brief(config: QuantConfig) -> str:
    return f"{config.weight} {config.pre_gelu_weight} {config.activation} {config.group_size} {config.split_inputs}"


@pytest.mark.parametrize("name", SMALL)
def test_each_linear_of_a_known_family_is_quantized_as_ever(name: str) -> None:
    assert decided(small_model(name)) == PINNED[name]
