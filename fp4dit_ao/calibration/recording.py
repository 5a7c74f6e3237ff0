"""``Recorder``: keeps the inputs of a transformer's calls, and refuses calls of more than one kind."""

import inspect

from torch import Tensor, nn
from tqdm import tqdm

from fp4dit_ao._compat import pytree
from fp4dit_ao.calibration.sample_cache import Sample
from fp4dit_ao.families.calls import call_of
from fp4dit_ao.graph_capture.sample_description import difference_of_kind


class Enough(Exception):
    """Raised to end a trajectory whose remaining calls are not wanted."""


class Recorder:
    """Forward pre-hook that keeps the inputs of the calls in ``wanted``, of all calls if None; looks at later ones, too, if
    ``to_the_end``."""

    def __init__(self, transformer: nn.Module, bar: tqdm, wanted: set[int] | None = None, to_the_end: bool = False):
        parameters = inspect.signature(transformer.forward).parameters
        self.names = list(parameters)
        self.defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        self.first: Sample | None = None
        self.bar, self.wanted, self.to_the_end = bar, wanted, to_the_end
        self.calls = 0
        self.kept: dict[int, Sample] = {}

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        sample = dict(zip(self.names, args, strict=False)) | kwargs
        sample.pop("return_dict", None)
        sample = call_of(type(module).__name__).adapt(sample)
        self._check_kind(module, self.defaults | sample)
        if self.wanted is not None and not self.to_the_end and self.calls > max(self.wanted, default=-1):
            raise Enough
        if self.wanted is None or self.calls in self.wanted:
            # copied, since the pipeline may overwrite the latent in place; embeddings stay shared between samples
            self.kept[self.calls] = {
                name: _own(value) if name == self.names[0] else value for name, value in sample.items()
            }
        self.calls += 1
        self.bar.update()

    def _check_kind(self, module: nn.Module, sample: Sample) -> None:
        self.first = self.first or sample
        if wrong := difference_of_kind(self.first, sample):
            raise ValueError(
                f"the pipeline calls its {type(module).__name__} in more than one way: {wrong}. A graph holds one of them; "
                "leave out the option that adds the other, or use quantize_modules(pipe.transformer), which takes any"
            )


def _own(value: object) -> object:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), value)
