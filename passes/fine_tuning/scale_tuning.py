"""Fine-tuning of weight scales, with codes frozen.

A quantized weight is ``level * scale``. Codes are what rounding made them; the scales of groups stay continuous, and are few
(one in 128 values), so that training them end to end takes little memory and cannot overfit much. PEQA (arXiv 2305.14152,
eq. 2) adds a learned difference to each scale. Here the difference is relative, ``scale * exp(delta)``: scales stay positive,
and one learning rate serves layers of any magnitude.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao._compat import pytree
from fp4dit_ao.observers import WeightObserver, set_fake_quantize
from fp4dit_ao.observers.fake_quantization import frozen_parameters
from fp4dit_ao.observers.weight import gram_of, weight_of
from fp4dit_ao.ops import expand_scale, to_scale_dtype
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS, FineTuneConfig, FineTuneReport
from fp4dit_ao.passes.fine_tuning.model_error import calls_of, loss, teacher, total_error
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.util.tensor_state import bytes_of, load_state, save_state


class TunedScale(nn.Module):
    """A weight with frozen codes and learned scales, in the place of an observer's own rounding.

    Args:
        weight: float ``(out_features, in_features)``.
        observer: of that weight, with its scale found.

    Attributes:
        delta: float32, shaped like the scale: the logarithm of the factor on each scale, zero at first.
    """

    levels: Tensor
    initial: Tensor

    def __init__(self, weight: Tensor, observer: WeightObserver):
        super().__init__()
        codes, scale = observer.quantized(weight)
        self.codes = codes
        self.dtype, self.scale_dtype = weight.dtype, scale.dtype
        self.register_buffer("levels", observer.fmt.decode(codes), persistent=False)
        self.register_buffer("initial", scale.float(), persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(self.initial))

    def scale(self) -> Tensor:
        """The learned scale, as it will be stored."""
        return to_scale_dtype(self.initial * self.delta.detach().exp(), self.scale_dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that ``levels`` and the learned scales stand for, in the type of the float weight."""
        exact = self.initial * self.delta.exp()
        scale = exact + (self.scale().float() - exact).detach()  # the stored scale's value, the exact one's gradient
        return (self.levels * expand_scale(scale, self.levels, block_of(self.levels, scale))).to(self.dtype)


def block_of(values: Tensor, scale: Tensor) -> list[int]:
    """torchao's ``block_size`` of a tensor whose scales have the shape of ``scale``."""
    return [size // count for size, count in zip(values.shape, scale.shape, strict=True)]


def tune_scales(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    config: FineTuneConfig,
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> FineTuneReport:
    """Trains the scales of all weights so that the model's outputs come closer to the float model's.

    See :class:`~fp4dit_ao.passes.fine_tuning.FineTune`. ``config.lr`` is relative: 1e-3 moves a scale by up to 0.1 % a step.

    Raises:
        ValueError: no samples; a weight whose scales are no free numbers (block formats); a checkpoint of another run.
    """
    began = time.monotonic()
    calls = calls_of(prepared, samples)
    tuned = _tuned_scales(prepared)
    store = None
    if checkpoint_dir is not None:
        store = _Store(Path(checkpoint_dir) / "scales.safetensors", _fingerprint(prepared, samples, config))
    with frozen_parameters(prepared), tqdm(total=config.steps, desc="fine-tune scales", disable=not progress) as bar:
        targets = teacher(prepared, calls)
        set_fake_quantize(prepared, weight=True, activation=True)
        with _in_place(tuned):
            before = total_error(prepared, calls, targets)
            _optimise(prepared, calls, targets, before, config, list(tuned.values()), store, bar)
            after = total_error(prepared, calls, targets)
        kept = after < before
        for observer, module in tuned.items():
            if kept:
                observer.codes, observer.scale = module.codes, module.scale()
    count = sum(module.delta.numel() for module in tuned.values())
    return FineTuneReport(before, after if kept else before, kept, count, time.monotonic() - began)


def _tuned_scales(prepared: GraphModule) -> dict[WeightObserver, TunedScale]:
    tuned: dict[WeightObserver, TunedScale] = {}
    for node, observer in weight_observers(prepared):
        if observer in tuned:
            continue
        if type(observer) is not WeightObserver:
            raise ValueError(
                f"{observer.name}: the scales of {type(observer).__name__} are no free numbers, so there is nothing to "
                "tune; use a recipe with scales of groups, such as w4a6"
            )
        weight = weight_of(prepared, node)
        observer.resolve(weight, gram_of(prepared, node))
        tuned[observer] = TunedScale(weight, observer)
    if not tuned:
        raise ValueError("this graph has no quantized weight whose scales could be tuned")
    return tuned


@contextlib.contextmanager
def _in_place(tuned: Mapping[WeightObserver, TunedScale]) -> Iterator[None]:
    """Lets the tuned scales stand for the observers' own rounding."""
    try:
        for observer, module in tuned.items():
            observer.rounding = module
        yield
    finally:
        for observer in tuned:
            observer.rounding = None


def _optimise(
    model: GraphModule,
    calls: Sequence[Mapping[str, object]],
    targets: Sequence[Sequence[Tensor]],
    before: float,
    config: FineTuneConfig,
    modules: Sequence[TunedScale],
    store: "_Store | None",
    bar: tqdm,
) -> None:
    parameters = [module.delta for module in modules]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    first = store.load(optimizer, parameters) if store is not None else 0
    bar.initial = bar.n = first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        # one generator a step: resuming needs no state of it
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = torch.randperm(len(calls), generator=generator)[: config.batch_size].tolist()
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            for index in chosen:
                torch.autograd.backward(loss(model, calls[index], targets[index]) / (before * len(chosen) or 1.0))
        optimizer.step()
        bar.update()
        if store is not None and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            store.save(optimizer, parameters, step + 1)


def _fingerprint(prepared: GraphModule, samples: Sequence[Mapping[str, object]], config: FineTuneConfig) -> str:
    """SHA-256 of everything that the result depends on: settings, graph, weights, scales, codes and samples."""
    digest = hashlib.sha256(repr(astuple(config)).encode() + prepared.code.encode())
    tensors = [x for _, o in weight_observers(prepared) for x in (o.scale, o.codes) if x is not None]
    leaves = [leaf for sample in samples for leaf in pytree.tree_leaves(dict(sample))]
    for x in (*prepared.parameters(), *tensors, *leaves):
        digest.update(bytes_of(x) if isinstance(x, Tensor) else repr(x).encode())
    return digest.hexdigest()


class _Store:
    """The state of a run in one file: learned values, and Adam's two moments of each.

    Args:
        path: of the file.
        fingerprint: of everything that the result depends on.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint

    def save(self, optimizer: torch.optim.Adam, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Writes the state after ``step`` steps, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            parts = {"delta": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            tensors |= {f"{index}.{name}": x for name, x in parts.items()}
        save_state(self.path, tensors, {"fingerprint": self.fingerprint, "step": json.dumps(step)})

    def load(self, optimizer: torch.optim.Adam, parameters: Sequence[nn.Parameter]) -> int:
        """Restores the state, and returns the number of steps that it holds; 0 if nothing was saved.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        if not self.path.exists():
            return 0
        tensors, metadata = load_state(self.path, "delete it to start anew")
        if metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{self.path} belongs to another run (other settings, weights or samples); repeat the settings of "
                "that run, or delete it to start anew"
            )
        step = int(json.loads(metadata["step"]))
        for index, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"{index}.delta"])
            moments = {name: tensors[f"{index}.{name}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step


FINE_TUNINGS.register(
    "scales", tune_scales, summary="Trains the scales of weights end to end, codes frozen, against the float model's output.",
    source="PEQA, arXiv 2305.14152, eq. 2", cost="some hundred forward and backward passes of the whole model",
)  # fmt: skip
