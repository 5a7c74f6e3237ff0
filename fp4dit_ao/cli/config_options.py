"""``--config``, ``--group-size``, ``--weight-search`` and ``--layer``: how a recipe is changed on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path


def config_fields(path: Path | None, group_size: int | None, weight_search: str | None = None) -> dict[str, object]:
    """Fields of ``QuantConfig`` that replace the recipe's: those of the JSON file ``path``, the group size and the search.

    Raises:
        ValueError: the file holds no JSON object.
        OSError: the file cannot be read.
    """
    fields: dict[str, object] = {}
    if path is not None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise OSError(f"cannot read {path}: {error.strerror}; name a JSON file of fields of QuantConfig") from error
        except ValueError as error:  # bytes that are no UTF-8, too
            raise ValueError(f"{path} is not valid JSON ({error}); see QuantConfig for its fields") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold a JSON object of fields of QuantConfig, found {type(found).__name__}")
        fields |= found
    given = {"group_size": group_size, "weight_search": weight_search}
    return fields | {name: value for name, value in given.items() if value is not None}


def layer_rules(options: Sequence[str] | None) -> dict[str, str | None]:
    """Recipes by glob from ``--layer GLOB=RECIPE``, in order; None for ``none``.

    Raises:
        ValueError: an option has no glob, no ``=`` or no recipe.
    """
    rules: dict[str, str | None] = {}
    for option in options or ():
        glob, _, recipe = option.rpartition("=")
        if not glob or not recipe:
            raise ValueError(f"--layer {option!r} is not GLOB=RECIPE; give, say, --layer 'blocks.0.*=none'")
        rules[glob] = None if recipe == "none" else recipe
    return rules
