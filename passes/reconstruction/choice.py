"""The config that names of methods, given one by one, stand for: what ``quantize_pipeline`` and the command line take."""

from collections.abc import Callable
from dataclasses import fields, replace

from fp4dit_ao.config import AdaRoundConfig, ReconstructionConfig
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS
from fp4dit_ao.passes.reconstruction.scopes import SCOPES

_FIND: dict[str, Callable[[str], object]] = {
    "rounding": ROUNDINGS.find, "objective": OBJECTIVES.find, "scope": SCOPES.find,
}  # fmt: skip

_DEFAULT = "gptq"
"""Rounding where nothing is said of rounding: nearer to full precision than scale-aware AdaRound on
the pipeline that ships, in less time (``python -m benchmarks.methods``)."""


def chosen_config(
    rounding: str | None = None,
    objective: str | None = None,
    scope: str | None = None,
    adaround: AdaRoundConfig | None = None,
    reconstruction: ReconstructionConfig | None = None,
) -> ReconstructionConfig:
    """One config of these arguments; every name in it is registered.

    Args:
        rounding: name of a rounding rule. None is that of the config given; without one, ``"adaround"`` for an objective or
            scope, and ``"gptq"`` where nothing is given. ``"adaround"`` is the paper's scale-aware AdaRound, or what
            ``adaround`` says.
        objective, scope: names; None is that of the config given.
        adaround: settings of learned rounding.
        reconstruction: all settings.

    Raises:
        ValueError: an unknown name, or arguments that contradict each other.
    """
    if all(x is None for x in (rounding, objective, scope, adaround, reconstruction)):
        rounding = _DEFAULT
    if adaround is not None and reconstruction is not None:
        raise ValueError("adaround and reconstruction both say how weights are rounded; give one of the two")
    names = {"rounding": rounding, "objective": objective, "scope": scope}
    given = {name: value for name, value in names.items() if value is not None}
    for name, value in given.items():
        _FIND[name](value)
    if reconstruction is not None:
        for name, value in given.items():
            if value != getattr(reconstruction, name):
                raise ValueError(
                    f"{name}={value!r}, but reconstruction has {name}={getattr(reconstruction, name)!r}; say it once"
                )
    elif adaround is not None and given.get("rounding", "adaround") not in ("adaround", "nearest", adaround.rounding):
        raise ValueError(
            f"rounding={rounding!r} with adaround, whose rounding is {adaround.rounding!r}; "
            f"give reconstruction=ReconstructionConfig({rounding!r}, …) instead"
        )
    elif given.get("rounding") == "adaround":
        del given["rounding"]
    base = reconstruction or adaround or AdaRoundConfig()
    config = ReconstructionConfig(**{f.name: getattr(base, f.name) for f in fields(ReconstructionConfig)})
    config = replace(
        config,
        rounding=given.get("rounding", config.rounding),
        objective=given.get("objective", config.objective),
        scope=given.get("scope", config.scope),
    )
    for name, find in _FIND.items():
        find(getattr(config, name))
    return config
