"""Methods named one by one, and configs, come to one config; contradictions are refused."""

from dataclasses import fields

import pytest

from fp4dit_ao import AdaRoundConfig, ReconstructionConfig
from fp4dit_ao.passes.reconstruction.choice import chosen_config


def settings(config: ReconstructionConfig) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in fields(ReconstructionConfig)}


def test_nothing_said_is_gptq() -> None:
    assert chosen_config() == ReconstructionConfig("gptq")


@pytest.mark.parametrize("arguments", [{"rounding": "adaround"}, {"objective": "mse"}, {"scope": "block"}], ids=str)
def test_what_is_learned_is_the_papers_way(arguments) -> None:
    assert settings(chosen_config(**arguments)) == settings(AdaRoundConfig())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rounding": "gptq"}, ReconstructionConfig("gptq")),
        ({"rounding": "nearest", "adaround": AdaRoundConfig(iters=3)}, ReconstructionConfig("nearest", iters=3)),
        ({"scope": "window"}, ReconstructionConfig(scope="window")),
        (
            {"rounding": "adaround", "scope": "layer", "adaround": AdaRoundConfig(iters=3, scale_aware=False)},
            ReconstructionConfig("adaround", scope="layer", iters=3),
        ),
        ({"reconstruction": ReconstructionConfig("gptq", batch_size=2)}, ReconstructionConfig("gptq", batch_size=2)),
        (
            {"rounding": "gptq", "scope": "layer", "reconstruction": ReconstructionConfig("gptq", scope="layer")},
            ReconstructionConfig("gptq", scope="layer"),
        ),
    ],
    ids=str,
)
def test_names_and_configs_come_together(arguments, expected) -> None:
    assert chosen_config(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "unknown rounding 'up'; choose one of nearest"),
        ({"objective": "up"}, "unknown objective 'up'; choose one of mse"),
        ({"scope": "up"}, "unknown scope 'up'; choose one of block"),
        ({"reconstruction": ReconstructionConfig("up")}, "unknown rounding 'up'"),
        (
            {"rounding": "gptq", "reconstruction": ReconstructionConfig()},
            "rounding='gptq', but reconstruction has rounding='scale_aware'; say it once",
        ),
        ({"adaround": AdaRoundConfig(), "reconstruction": ReconstructionConfig()}, "give one of the two"),
        (
            {"rounding": "gptq", "adaround": AdaRoundConfig()},
            "rounding='gptq' with adaround, whose rounding is 'scale_aware'",
        ),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_config(**arguments)
