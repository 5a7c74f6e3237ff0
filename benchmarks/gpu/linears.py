"""Part ``linears``: whole linears, tokens quantized in the time, and products of quantized tokens, as ratios to cuBLAS."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.measuring import Call, Run, all_measured, error_of
from fp4dit_ao import FloatFormat, MinifloatTensor, _compat
from fp4dit_ao.benchmark.linears import low_bit
from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.kernels import codebook_linear
from fp4dit_ao.kernels.cpu.int8_linear import level_table
from fp4dit_ao.kernels.token_quantization import fp8_tokens, quantize_tokens
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.util.markdown import markdown_table

SHAPES = {
    "FLUX": [(12288, 3072), (3072, 12288), (3072, 3072)],
    "PixArt-XL": [(4608, 1152), (1152, 4608), (1152, 1152)],
    "SD3": [(6144, 1536), (1536, 6144), (1536, 1536)],
    "Hunyuan-DiT": [(6144, 1408), (1408, 6144), (1408, 1408)],
}
"""Sizes of the attention and feed-forward linears of each model, (out_features, in_features)."""
TOKENS = (4096, 16384, 1024, 512, 256, 64, 16)
REPEAT = 10
"""Calls in one CUDA graph."""
BASE = "bfloat16"
RECIPES = ("w4a6_codebook", "w4a8_codebook", "w4a6")
OTHERS = ("torchao FP8", "torchao INT8")


def whole_linears(rows: int, features: int, depth: int, device: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Linears from bfloat16 to bfloat16, compiled, by name; and errors of those that could not be made."""
    torch.manual_seed(0)
    x = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
    weight = torch.randn(features, depth, device=device, dtype=torch.bfloat16)
    bias = torch.randn(features, device=device, dtype=torch.bfloat16)
    calls: dict[str, Call] = {BASE: lambda: F.linear(x, weight, bias)}
    failed: dict[str, str] = {}
    for name in (*RECIPES, *OTHERS):
        try:
            calls[name] = _compiled_linear(name, weight, bias, x)
        except Exception as error:
            failed[name] = error_of(error)
    return calls, failed


def _compiled_linear(name: str, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    if name in RECIPES:
        held = low_bit(weight, name)
        run = torch.compile(lambda x: F.linear(x, held, bias))
        return lambda: run(x)
    features, depth = weight.shape
    linear = nn.Linear(depth, features, device=weight.device, dtype=weight.dtype).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    model = PEERS[name].convert(nn.Sequential(linear), ["0"])
    compiled = torch.compile(model)
    return lambda: compiled(x)


def products(rows: int, features: int, depth: int, device: str) -> dict[str, Call]:
    """Products of E2M3 tokens and weights with codebook groups by name, decoding included, and the vendor's of bytes."""
    torch.manual_seed(0)
    half = torch.randn(rows, depth, device=device).bfloat16()
    half_weight = torch.randn(features, depth, device=device).bfloat16()
    groups = low_bit(half_weight, "w4a6_codebook")
    stored = groups.qdata, groups.index, groups.codebooks, groups.row_scale
    levels = codebook_linear.decode(*stored[:3], groups.group_size)
    eights, eights_scale = fp8_tokens(half, "e2m3")
    tokens, token_scale = quantize_tokens(half, "e2m3")
    ops = torch.ops.fp4dit_ao
    columns, fp8_levels = groups.row_scale.float().reshape(1, -1), levels.to(torch.float8_e4m3fn)
    padded = F.pad(tokens, (0, 0, 0, max(0, 32 - rows)))
    return {
        BASE: lambda: F.linear(half, half_weight),
        "ours, FP8": lambda: ops.fp8_codebook_linear(eights, eights_scale, *stored, None, groups.group_size),
        "_scaled_mm": lambda: _compat.fp8_product(
            eights, fp8_levels.T, eights_scale, columns, torch.bfloat16, fast=True
        ),
        "ours, int8": lambda: ops.codebook_linear(
            tokens, token_scale, *stored, None, torch.bfloat16, 1, groups.group_size
        ),
        "_int_mm": lambda: _compat.int8_product(padded, levels.T),
    }


def grouped_products(rows: int, features: int, depth: int, device: str) -> dict[str, Call]:
    """Products of E2M3 tokens and E2M1 weights in groups of 128 with float scales, by name."""
    torch.manual_seed(0)
    weight, x = torch.randn(features, depth, device=device), torch.randn(rows, depth, device=device)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    packed = MinifloatTensor.from_hp(half_weight, [1, 128], "e2m1", "e2m3", torch.float16)
    int8, fp8 = LevelTensor.from_packed(packed, "int8"), LevelTensor.from_packed(packed, "fp8")
    tokens, token_scale = quantize_tokens(half, "e2m3")
    eights = tokens.to(torch.float8_e4m3fn)
    table = level_table(FloatFormat.parse("e2m1"))
    ops = torch.ops.fp4dit_ao
    out = torch.bfloat16

    def packed_fp8() -> Tensor:
        from fp4dit_ao.kernels.cuda import triton_linear

        return triton_linear.run(eights, token_scale, packed.qdata, packed.scale, table, None, out)

    x_scale, w_scale = block_wise_scales(token_scale, packed.scale, depth)
    return {
        BASE: lambda: F.linear(half, half_weight),
        "ours, packed": lambda: ops.int8_linear(tokens, token_scale, packed.qdata, packed.scale, table, None, out),
        "ours, int8": lambda: ops.level_linear(tokens, token_scale, int8.qdata, int8.scale, None, out),
        "ours, packed fp8": packed_fp8,
        "ours, fp8": lambda: ops.level_linear(eights, token_scale, fp8.qdata, fp8.scale, None, out),
        "scaled_mm fp8, blocks of 128": lambda: block_wise_product(eights, fp8.qdata, x_scale, w_scale),
    }


def block_wise_scales(token_scale: Tensor, scale: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Scales of blocks of 128 inputs as ``F.scaled_mm`` takes them: ``(rows, blocks)`` and ``(features, blocks)``, both stored
    block by block.

    Args:
        token_scale: float32 ``(rows, 1)``.
        scale: ``(features, blocks)``.
        depth: input features.
    """
    return token_scale.expand(-1, depth // 128).T.contiguous().T, scale.float().T.contiguous().T


def block_wise_product(tokens: Tensor, levels: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """PyTorch's FP8 product with a scale for every 128 inputs of a token and of a row, bfloat16."""
    recipe = torch.nn.functional.ScalingType.BlockWise1x128
    return F.scaled_mm(tokens, levels.T, x_scale, recipe, w_scale, recipe, output_dtype=torch.bfloat16)


def measure(run: Run) -> None:
    """Products at the two largest token counts, then whole linears, then the rest, as far as time allows."""
    cases = [(rows, *shape) for rows in TOKENS for name in SHAPES if run.only in name for shape in SHAPES[name]]
    telling = [case for case in cases if case[1:] in SHAPES["FLUX"] + SHAPES["PixArt-XL"]]
    order = [("product", case) for case in telling[:12]] + [("whole", case) for case in telling[:6]]
    order += [(kind, case) for kind in ("product", "whole", "grouped") for case in cases if (kind, case) not in order]
    found: dict[str, list[dict[str, Any]]] = {"product": [], "whole": [], "grouped": []}
    for kind, case in order:
        rows, features, depth = case
        if not run.has_time(f"{kind} {features} x {depth}, {rows} tokens", 2 if kind == "product" else 15):
            continue
        result = one(kind, rows, features, depth, run)
        found[kind].append(result)
        run.record("linears", {"kind": kind, **result})
        run.say(f"{kind} {features} x {depth}, {rows} tokens: " + _ratios(result))
        if kind == "whole":
            torch.compiler.reset()  # else the many linears of one function reach its limit of recompilations
    for kind, results in found.items():
        if results:
            run.say(f"\n{kind}:\n\n{table(results)}")


def one(kind: str, rows: int, features: int, depth: int, run: Run) -> dict[str, Any]:
    """Seconds of each variant, differences of ours from the exact ones, and errors of those that failed."""
    failed: dict[str, str] = {}
    if kind == "whole":
        calls, failed = whole_linears(rows, features, depth, run.device)
    else:
        calls = (products if kind == "product" else grouped_products)(rows, features, depth, run.device)
    result, values = all_measured(calls, run, REPEAT)
    result["failed"] |= failed
    result["difference"] = {}
    reference = values.get("ours, int8")
    if reference is not None:
        alike = {n: y.float() for n, y in values.items() if n.startswith("ours")}
        norm = reference.float().norm()
        result["difference"] = {name: float((y - reference.float()).norm() / norm) for name, y in alike.items()}
    return {"out_features": features, "in_features": depth, "tokens": rows} | result


def _medians(result: dict[str, Any]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in result["seconds"].items()}


def _ratios(result: dict[str, Any]) -> str:
    median = _medians(result)
    told = [f"{name} {median[BASE] / took:.2f}" for name, took in median.items() if BASE in median and name != BASE]
    return ", ".join(told + [f"{name} failed ({why})" for name, why in result["failed"].items()])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Table of speeds as ratios to bfloat16, and of the operations per second that our fastest variant reaches."""
    names = list(dict.fromkeys(name for result in results for name in (*result["seconds"], *result["failed"])))
    names.remove(BASE)
    rows = []
    for result in results:
        median = _medians(result)
        shape, tokens = (result["out_features"], result["in_features"]), result["tokens"]
        operations = 2 * shape[0] * shape[1] * tokens
        mine = [median[name] for name in median if name.startswith("ours") or name in RECIPES]
        best = min(mine, default=float("nan"))
        cells = [f"{median[BASE] / median[name]:.2f}" if name in median else "failed" for name in names]
        rows.append([f"{shape[0]} x {shape[1]}", str(tokens), *cells, f"{median[BASE] * 1e6:.0f}",
                     f"{operations / best / 1e12:.0f}"])  # fmt: skip
    failures = dict(pair for result in results for pair in result["failed"].items())
    said = "".join(f"\n{name} failed: {error}" for name, error in failures.items())
    head = ["weight", "tokens", *names, f"{BASE}, µs", "ours, 10¹² operations / s"]
    return f"{markdown_table(head, rows)}\n\nSpeed as a ratio to {BASE} (cuBLAS).{said}"
