"""Workload: linears of one size, by our recipes, floats, int8 products of PyTorch and oneDNN, or a peer."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao.benchmark import exact, memory
from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Facts, Workload
from fp4dit_ao.config import RECIPES, QuantConfig
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels.cpu.int8_linear import level_table
from fp4dit_ao.kernels.token_quantization import quantize_tokens
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor

SHAPES: dict[str, list[tuple[int, int]]] = {
    "pixart-xl": [(1152, 1152), (4608, 1152), (1152, 4608)],
    "hunyuan-dit": [(1408, 1408), (6144, 1408), (1408, 6144)],
    "sd3": [(1536, 1536), (6144, 1536), (1536, 6144)],
    "flux": [(3072, 3072), (12288, 3072), (3072, 12288)],
}
"""Sizes of the attention and feed-forward linears of each model, (out_features, in_features)."""
INT_MM = Variant("torch._int_mm")
"""Raw int8 product of the same size, int32 out, without scales or quantization: a ceiling, not a peer."""
ONEDNN = Variant("oneDNN int8, prepacked")
"""oneDNN's int8 product with the weight laid out beforehand: a scale per row and one for all tokens, bfloat16 out; another
ceiling, since tokens are quantized already."""
PRODUCT = ", product alone"
"""Suffix of a recipe whose tokens are quantized before timing starts."""
_JUDGED_TOKENS = 64
"""Tokens whose outputs are compared with float32."""
MOST_LINEARS, MOST_TOKENS = 8, 8192
"""Most linears that are called together, each with its own weight and tokens, and most tokens of them in all. A model
enters a compiled function once for many linears, and entering takes as long as the work of one token."""
_WARM_UP = 3
"""Calls before timing starts; some peers compile again in their second call."""


def cases(text: str) -> tuple[list[dict[str, int]], bool]:
    """Reads ``flux:256,1024`` or ``4608x1152:16+peers``: one case per shape and number of tokens, the most tokens
    first.

    A graph that is first compiled for one token would stay single-threaded for all later cases.

    Returns:
        The cases, and whether peers are measured.

    Raises:
        ValueError: ``text`` is spelled differently.
    """
    sizes, plus, peers = text.partition("+")
    name, _, counts = sizes.partition(":")
    size, tokens = name.split("x"), counts.split(",")
    shapes = SHAPES.get(name) or ([(int(size[0]), int(size[1]))] if len(size) == 2 and _whole(size) else [])
    if not shapes or not _whole(tokens) or (plus and peers != "peers"):
        raise ValueError(
            f"unknown linear {text!r}; give OUTxIN or one of {', '.join(SHAPES)}, then tokens: 4608x1152:16,256+peers"
        )
    counted = sorted((int(token) for token in tokens), reverse=True)
    return [{"out_features": out, "in_features": depth, "tokens": n} for out, depth in shapes for n in counted], bool(
        peers
    )


def _whole(texts: Sequence[str]) -> bool:
    return all(text.isdecimal() and int(text) > 0 for text in texts)


def numbers(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float32 weight ``(out, in)`` and input ``(tokens, in)``, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    return weight, torch.randn(tokens, in_features, generator=generator)


class Linears(nn.Module):
    """Linears of one size, each called with its own tokens."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, device: str):
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
            self.linears.append(linear)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]


class Linear(Workload):
    """Linears by one variant; the size may change from case to case.

    Args:
        method: a float type, a recipe (with :data:`PRODUCT` or without), a peer, or one of the ceilings.
        mode: ``"eager"`` or ``"compiled"``, with a dynamic number of tokens as in models.
        device: such as ``"cpu"``.
        threads: CPU threads.
    """

    def __init__(self, method: str, mode: str, device: str, threads: int):
        torch.set_num_threads(threads)
        self.method, self.mode, self.device = method, mode, device
        self.call: Callable[[], Sequence[Tensor]] = lambda: []
        self._made: tuple[tuple[int, int, int], Callable[[list[Tensor]], list[Tensor]], Facts] | None = None

    @torch.no_grad()
    def prepare(self, **case: Any) -> Facts:
        size = case["out_features"], case["in_features"]
        self.per_run = max(1, min(MOST_LINEARS, MOST_TOKENS // case["tokens"]))
        pairs = [numbers(*size, case["tokens"], seed) for seed in range(self.per_run)]
        if self.method == INT_MM.method:
            products = [(_to_int8(x).to(self.device), _to_int8(weight).to(self.device).T) for weight, x in pairs]
            self.call = lambda: [_compat.int8_product(x, weight) for x, weight in products]
            self.call()
            return {"bits": 8.0}
        if self.method == ONEDNN.method:
            scale = torch.ones(case["out_features"])
            linears = [
                _compat.prepacked_int8_linear(_to_int8(x), _to_int8(weight), scale, torch.bfloat16)
                for weight, x in pairs
            ]
            self.call = lambda: [linear() for linear in linears]
            self.call()
            return {"bits": 8.0 + 32 / case["in_features"]}
        if self.method.endswith(PRODUCT):
            return self._product(pairs)
        if self._made is None or self._made[0] != (*size, self.per_run):  # converted once for all numbers of tokens
            self._made = ((*size, self.per_run), *self._make([weight for weight, _ in pairs]))
        _, model, facts = self._made
        self.call = functools.partial(model, [x.to(self.device, self._dtype) for _, x in pairs])
        for _ in range(_WARM_UP):
            first = self.call()[0]
        weight, x = pairs[0]
        wanted = F.linear(x[:_JUDGED_TOKENS], weight)
        return facts | {"error": exact.relative_error(first[:_JUDGED_TOKENS].cpu(), wanted)}

    @torch.no_grad()
    def run(self) -> None:
        self.call()

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, Variant(self.method).dtype)
        return dtype

    def _make(self, weights: Sequence[Tensor]) -> tuple[Callable[[list[Tensor]], list[Tensor]], Facts]:
        torch.compiler.reset()  # drops the guards of earlier sizes, which every call would check
        out_features, in_features = weights[0].shape
        linears = Linears(weights, self._dtype, self.device)
        model: nn.Module = linears
        names = [f"linears.{index}" for index in range(len(weights))]
        facts: Facts = {}
        if self.method in PEERS:
            model = PEERS[self.method].convert(model, names)
        elif self.method in RECIPES:
            made = [low_bit(weight.to(self.device), self.method) for weight in weights]
            for linear, weight in zip(linears.linears, made, strict=True):
                linear.weight = nn.Parameter(weight, requires_grad=False)
            quantized = made[0]
            if isinstance(quantized, MinifloatTensor | CodebookTensor):  # others do not quantize token-wise
                x = numbers(out_features, in_features, _JUDGED_TOKENS)[1].to(self.device)
                x_hat, w_hat = exact.token_wise(x, quantized.act_fmt), quantized.dequantize(torch.float32).double()
                facts["deviation"] = exact.relative_error(F.linear(x, quantized), F.linear(x_hat, w_hat))
            facts["bytes"] = sum(memory.stored({"": quantized}).values())
        facts["bits"] = memory.bits_per_weight(model, dict.fromkeys(names, (out_features, in_features)))
        return torch.compile(model, dynamic=True) if self.mode == "compiled" else model, facts

    def _product(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Facts:
        products = []
        for weight, x in pairs:
            quantized = low_bit(weight.to(self.device), self.method.removesuffix(PRODUCT))
            if not isinstance(quantized, MinifloatTensor | CodebookTensor) or quantized.act_fmt is None:
                raise ValueError("only the product of token-wise quantized inputs can be timed alone")
            tokens = quantize_tokens(x.to(self.device, torch.bfloat16), quantized.act_fmt)
            products.append(functools.partial(_multiply, quantized, *tokens))
        self.call = lambda: [product() for product in products]
        self.call()
        return {}


def _multiply(weight: MinifloatTensor | CodebookTensor, tokens: Tensor, token_scale: Tensor) -> Tensor:
    """bfloat16 product of tokens that are quantized already, to levels of one digit."""
    y: Tensor
    if isinstance(weight, CodebookTensor):
        parts = weight.qdata, weight.index, weight.codebooks, weight.row_scale
        y = torch.ops.fp4dit_ao.codebook_linear(
            tokens, token_scale, *parts, None, torch.bfloat16, group_size=weight.group_size
        )
    else:
        table = level_table(parse(weight.fmt))
        y = torch.ops.fp4dit_ao.int8_linear(
            tokens, token_scale, weight.qdata, weight.scale, table, None, torch.bfloat16
        )
    return y


def _to_int8(x: Tensor) -> Tensor:
    return (x * 40).round().clamp(-127, 127).to(torch.int8)


def low_bit(weight: Tensor, recipe: str) -> Tensor:
    """``weight`` as the recipe's first linear holds it, rounded to nearest."""
    config = QuantConfig.from_name(recipe)
    config = replace(config, weight=config.weight or config.weight_candidates[0], weight_candidates=())
    return scheme_of(config).round_to_nearest("linear", weight.bfloat16(), config)
