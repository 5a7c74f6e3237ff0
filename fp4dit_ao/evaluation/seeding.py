"""Generator seeds of images: every image has its own, so that no image depends on those drawn before it."""

from collections.abc import Callable

from fp4dit_ao.evaluation.prompt_sets import Prompt

_STRIDE = 1_000_003
"""Prime larger than any number of prompts, so that (seed, prompt) pairs get distinct generator seeds."""


def image_seed(seed: int, prompt_index: int) -> int:
    """Generator seed of one image, which depends on its seed and prompt only, not on the batch."""
    return seed * _STRIDE + prompt_index


def _distinct(seed: int, index: int, prompt: Prompt) -> int:
    return image_seed(seed, index)


def _same(seed: int, index: int, prompt: Prompt) -> int:
    return seed


def _by_name(seed: int, index: int, prompt: Prompt) -> int:
    """deepcompressor's: a polynomial hash of the prompt's name, base 31, modulo 10^9 + 7."""
    value = 0
    for letter in prompt.name:
        value = (value * 31 + ord(letter)) % (10**9 + 7)
    return value + seed


SEEDINGS: dict[str, Callable[[int, int, Prompt], int]] = {"distinct": _distinct, "same": _same, "name": _by_name}
"""Rules by name, which give the generator's seed from an image's seed, its prompt's position, and its prompt. ``distinct``
draws every image from other noise; ``same`` resets the generator to the same seed before every image, as FP4DiT does with 42;
``name`` is deepcompressor's."""


def seeding(name: str) -> Callable[[int, int, Prompt], int]:
    """The function of that name in :data:`SEEDINGS`.

    Raises:
        ValueError: there is none.
    """
    if name not in SEEDINGS:
        raise ValueError(f"unknown seeding {name!r}; choose one of {', '.join(SEEDINGS)}")
    return SEEDINGS[name]
