"""``--call NAME=VALUE``: further arguments of a pipeline's call, on the command line."""

import json
from collections.abc import Sequence

OWN = {
    "prompt": "--prompt or --prompts", "generator": "--seed", "output_type": "nothing: images are always arrays",
    "num_inference_steps": "--steps",
}  # fmt: skip
"""Arguments that commands pass themselves, and what to give in their place."""


def call_options(options: Sequence[str] | None, steps: int | None) -> dict[str, object]:
    """Arguments of a pipeline's call from ``--call`` and ``--steps``. A value is JSON if it can be, else text.

    Raises:
        ValueError: an option has no name or no ``=``, is there twice, or names an argument that has an option of its own.
    """
    call: dict[str, object] = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"--call {option!r} is not NAME=VALUE; give, say, --call height=512")
        if name in OWN:
            raise ValueError(f"--call {name}=… is not for --call; give {OWN[name]}")
        if name in call:
            raise ValueError(f"--call gives {name} twice")
        try:
            call[name] = json.loads(value)
        except ValueError:
            call[name] = value
    return call if steps is None else call | {"num_inference_steps": steps}
