"""Straightforward reconstruction as a baseline: hooks, modules that round softly through autograd, stock Adam."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao import AdaRoundConfig, FloatFormat, QuantConfig
from fp4dit_ao.passes.partition import weight_observers


def fake_quantize(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Fake quantization per token with a straight-through gradient, by logarithm and floor."""
    largest = float(fmt.lattice_max)
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    y = (x / scale).detach()
    step = element_step(y, fmt)
    rounded = (torch.round(y / step) * step).clamp(-largest, largest) * scale
    return x + (rounded - x).detach()


def element_step(y: Tensor, fmt: FloatFormat) -> Tensor:
    """Distance between neighbouring levels at ``y``, in lattice steps."""
    exponent = torch.floor(torch.log2(y.abs().clamp_min(1e-30))) - fmt.mantissa_bits
    return torch.exp2(exponent.clamp_min(0))


class SoftLinear(nn.Module):
    """Linear that learns its rounding by scale-aware AdaRound in plain autograd."""

    def __init__(self, linear: nn.Linear, fmt: FloatFormat, group: int, activation: FloatFormat | None):
        super().__init__()
        self.activation, self.bias, self.shape = activation, linear.bias, linear.weight.shape
        self.largest = float(fmt.lattice_max)
        w = linear.weight.detach().reshape(len(linear.weight), -1, group)
        self.scale = w.abs().amax(-1, keepdim=True).clamp_min(1e-12) / self.largest
        y = w / self.scale
        self.step = element_step(y, fmt)
        self.low = torch.floor(y / self.step)
        self.unit = self.scale * self.step
        self.alpha = nn.Parameter(torch.logit((y / self.step - self.low + 0.1) / 1.2) * self.unit)

    def gate(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.alpha / self.unit) - 0.1).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        level = ((self.low + self.gate()) * self.step).clamp(-self.largest, self.largest)
        x = x if self.activation is None else fake_quantize(x, self.activation)
        return F.linear(x, (self.scale * level).reshape(self.shape), self.bias)


@contextmanager
def quantized_attention(fmt: FloatFormat | None) -> Iterator[None]:
    """Context in which every attention quantizes its q, k and v."""
    original = F.scaled_dot_product_attention

    def quantized(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fmt is not None:
            q, k, v = (fake_quantize(x, fmt) for x in (q, k, v))
        return original(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = quantized  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original  # type: ignore[assignment]


class EagerLoop:
    """Straightforward reconstruction of module ``name``: hooks record its calls, :class:`SoftLinear` replaces its
    linears."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        prepared: GraphModule,
        samples: list[Any],
        config: AdaRoundConfig,
        recipe: QuantConfig,
    ):  # fmt: skip
        block = model.get_submodule(name)
        self.name, self.config = name, config
        self.attention = FloatFormat.parse(recipe.attention) if recipe.attention else None
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        hook = block.register_forward_hook(lambda m, args, kwargs, y: calls.append((args, kwargs, y)), with_kwargs=True)
        with torch.no_grad():
            for sample in samples:
                model(**sample)
        hook.remove()
        self.args = [_joined([args[i] for args, _, _ in calls]) for i in range(len(calls[0][0]))]
        self.kwargs = {name: _joined([kwargs[name] for _, kwargs, _ in calls]) for name in calls[0][1]}
        self.target = _joined([y for _, _, y in calls])
        self.block = self._soft(block, prepared, recipe)
        self.parameters = [p for name, p in self.block.named_parameters() if name.endswith("alpha")]
        for p in set(self.block.parameters()) - set(self.parameters):
            p.requires_grad_(False)
        lr = config.step_in_logits * float(torch.cat([m.unit.flatten() for m in self._linears()]).median())
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-20)
        self.power = self.target.square().mean()
        with torch.no_grad(), self._hardened():
            self.before = self._loss(torch.arange(len(self.target))).item()
        self.iteration = 0

    def _linears(self) -> list[SoftLinear]:
        return [m for m in self.block.modules() if isinstance(m, SoftLinear)]

    def _soft(self, block: nn.Module, prepared: GraphModule, recipe: QuantConfig) -> nn.Module:
        block = copy.deepcopy(block)
        activation = FloatFormat.parse(recipe.activation) if recipe.activation else None
        for _, observer in weight_observers(prepared):
            name = observer.name.removesuffix(".weight")
            if not name.startswith(self.name + "."):
                continue
            parent, _, child = name.removeprefix(self.name + ".").rpartition(".")
            linear = block.get_submodule(f"{parent}.{child}")
            group = math.gcd(linear.in_features, 128)  # type: ignore[arg-type]
            setattr(block.get_submodule(parent), child, SoftLinear(linear, observer.fmt, group, activation))  # type: ignore[arg-type]
        return block

    @contextmanager
    def _hardened(self) -> Iterator[None]:
        kept = [m.alpha.data for m in self._linears()]
        for m in self._linears():
            m.alpha.data = torch.where(m.alpha.data >= 0, 9.0, -9.0) * m.unit
        yield
        for m, alpha in zip(self._linears(), kept, strict=True):
            m.alpha.data = alpha

    def _loss(self, rows: Tensor) -> Tensor:
        def pick(x: Any) -> Any:
            return x[rows] if isinstance(x, Tensor) and len(x) == len(self.target) else x

        with quantized_attention(self.attention):
            y = self.block(*map(pick, self.args), **{name: pick(x) for name, x in self.kwargs.items()})
        return (y - self.target[rows]).square().mean() / self.power

    def step(self) -> None:
        """Runs one iteration."""
        rows = torch.randperm(len(self.target))[: self.config.batch_size]
        self.optimizer.zero_grad()
        loss = self._loss(rows) / self.before
        warm = round(self.config.warmup * self.config.iters)
        if self.iteration >= warm:
            beta = self.config.beta_at((self.iteration - warm) / max(1, self.config.iters - warm))
            count = sum(p.numel() for p in self.parameters)
            loss = loss + sum((1 - (2 * m.gate() - 1).abs().pow(beta)).sum() for m in self._linears()) / count
        loss.backward()
        self.optimizer.step()
        self.iteration += 1


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]
