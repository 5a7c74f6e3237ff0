"""Linears and a whole step on one NVIDIA GPU, compared with other kernels: ``python -m benchmarks.gpu``.

It takes at most ``--minutes``, and lists what there was no time for. Every product is captured in a CUDA graph of ten
calls, so that launches from Python are not timed; graphs are replayed in turns, so that a warming chip affects all
alike. Printed are medians over the rounds, as ratios to cuBLAS in bfloat16. A variant that fails is listed with its
error. The step is PixArt-XL's at 1024 px with guidance batch 2, compiled, tokens' quantization included. Writes
``gpu.json`` after each part.

It needs torch 2.11 or newer with CUDA and Triton, torchao and diffusers. On machines without
internet access, unpack the wheels of the last two onto PYTHONPATH.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from fp4dit_ao import FloatFormat, MinifloatTensor, _compat, unpack_weights
from fp4dit_ao._compat import pytree
from fp4dit_ao.benchmark.memory import weight_bytes
from fp4dit_ao.benchmark.transformers import PIXART_XL, quantized, random_model, sample
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.kernels.cpu.int8_linear import level_table
from fp4dit_ao.kernels.token_quantization import quantize_tokens
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

SHAPES = {
    "FLUX": [(3072, 3072), (12288, 3072), (3072, 12288)],
    "PixArt-XL": [(1152, 1152), (4608, 1152), (1152, 4608)],
    "SD3": [(1536, 1536), (6144, 1536), (1536, 6144)],
    "Hunyuan-DiT": [(1408, 1408), (6144, 1408), (1408, 6144)],
}
"""Sizes of the attention and feed-forward linears of each model, (out_features, in_features)."""
CALLS = 10
"""Calls in one CUDA graph."""
BASE = "bfloat16"
Variant = Callable[[], Tensor]


def variants(rows: int, features: int, depth: int, device: str) -> dict[str, Variant]:
    """Timed products of quantized tokens, by name; ours multiply E2M1 weights in groups of 128 with E2M3 tokens."""
    torch.manual_seed(0)
    weight, x = torch.randn(features, depth, device=device), torch.randn(rows, depth, device=device)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    packed = MinifloatTensor.from_hp(half_weight, [1, 128], "e2m1", "e2m3", torch.float16)
    int8, fp8 = LevelTensor.from_packed(packed, "int8"), LevelTensor.from_packed(packed, "fp8")
    tokens, token_scale = quantize_tokens(half, "e2m3")
    eights = tokens.to(torch.float8_e4m3fn)
    table = level_table(FloatFormat.parse("e2m1"))
    columns = torch.ones(1, features, device=device)
    ops = torch.ops.fp4dit_ao
    out = torch.bfloat16

    def packed_fp8() -> Tensor:
        from fp4dit_ao.kernels.cuda import triton_linear

        return triton_linear.run(eights, token_scale, packed.qdata, packed.scale, table, None, out)

    def block_wise_fp8() -> Tensor:
        recipe = torch.nn.functional.ScalingType.BlockWise1x128
        x_scale = token_scale.expand(rows, depth // 128).T.contiguous().T
        w_scale = packed.scale.float().T.contiguous().T
        return F.scaled_mm(eights, fp8.qdata.T, x_scale, recipe, w_scale.T, recipe, output_dtype=out)

    padded = F.pad(tokens, (0, 0, 0, max(0, 32 - rows)))
    return {
        BASE: lambda: F.linear(half, half_weight),
        "ours, packed": lambda: ops.int8_linear(tokens, token_scale, packed.qdata, packed.scale, table, None, out),
        "ours, int8": lambda: ops.level_linear(tokens, token_scale, int8.qdata, int8.scale, None, out),
        "ours, packed fp8": packed_fp8,
        "ours, fp8": lambda: ops.level_linear(eights, token_scale, fp8.qdata, fp8.scale, None, out),
        "_int_mm": lambda: _compat.int8_product(padded, int8.qdata.T),
        "_scaled_mm fp8": lambda: _compat.fp8_product(eights, fp8.qdata.T, token_scale, columns, out),
        "scaled_mm fp8, blocks of 128": block_wise_fp8,
    }


def prepared(call: Variant, device: str) -> tuple[Callable[[], float], Tensor]:
    """Function that runs ``call`` and returns the seconds it took; and the result of ``call``."""
    result = call()  # tunes and compiles
    if device == "cpu":

        def on_cpu() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        return on_cpu, result
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / CALLS

    return replay, result


def measure(rows: int, features: int, depth: int, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of every variant, measured in turns; differences of ours from the int8 one; errors of those that
    failed."""
    timers: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    for name, call in variants(rows, features, depth, device).items():
        try:
            timers[name], results[name] = prepared(call, device)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, timer in timers.items():
            took = timer()
            if number:  # the first one warms up
                seconds[name].append(took)
    ours = {name: y.float() for name, y in results.items() if name.startswith("ours")}
    reference = ours.get("ours, int8")
    differ = {} if reference is None else {n: float((y - reference).norm() / reference.norm()) for n, y in ours.items()}
    size = {"out_features": features, "in_features": depth, "tokens": rows}
    return size | {"seconds": seconds, "failed": failed, "difference": differ}


def gemm_table(results: Sequence[dict[str, Any]]) -> str:
    """Table of speeds as ratios to bfloat16, and of the operations per second that our fastest variant reaches."""
    names = list(dict.fromkeys(name for result in results for name in (*result["seconds"], *result["failed"])))
    names.remove(BASE)
    rows = []
    for result in results:
        median = {name: statistics.median(taken) for name, taken in result["seconds"].items()}
        shape, tokens = (result["out_features"], result["in_features"]), result["tokens"]
        operations = 2 * shape[0] * shape[1] * tokens
        best = min((median[name] for name in median if name.startswith("ours")), default=float("nan"))
        cells = [f"{median[BASE] / median[name]:.2f}" if name in median else "failed" for name in names]
        rows.append([f"{shape[0]} x {shape[1]}", str(tokens), *cells, f"{median[BASE] * 1e6:.0f}",
                     f"{operations / best / 1e12:.0f}"])  # fmt: skip
    failures = dict(pair for result in results for pair in result["failed"].items())
    said = "".join(f"\n{name} failed: {error}" for name, error in failures.items())
    table = markdown_table(["weight", "tokens", *names, f"{BASE}, µs", "ours, 10¹² operations / s"], rows)
    return f"{table}\n\nSpeed as a ratio to {BASE} (cuBLAS).{said}"


def gpu() -> dict[str, Any]:
    """Name, driver, clock and power limit of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        driver = f"unknown ({type(error).__name__})"
    return {
        "name": properties.name, "driver, clock, power": driver, "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory, "cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability(0),
    }  # fmt: skip


def step(layers: int, pixels: int, rounds: int, device: str, until: float) -> dict[str, Any]:
    """Seconds of one compiled denoising step of each model, measured in turns; bytes of weights; seconds of first
    calls."""
    half = random_model(PIXART_XL | {"num_layers": layers}, pixels, torch.bfloat16).to(device)
    inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), sample(pixels, torch.bfloat16))
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        f"{BASE}, compiled": lambda: half,
        "w4a6 packed, compiled": lambda: quantized(half, inputs, "w4a6").graph,
        "w4a6 int8, compiled": lambda: unpack_weights(quantized(half, inputs, "w4a6").graph, "int8"),
    }
    runs: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    size: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, make in tqdm(makers.items(), desc="compiling steps"):
        if time.monotonic() + max(first.values(), default=0) > until:
            skipped[name] = "no time left"
            continue
        try:
            model = make()
            compiled = torch.compile(model)
            began = time.monotonic()
            compiled(**inputs)
            _synchronize(device)
            first[name], size[name] = time.monotonic() - began, weight_bytes(model)
            runs[name] = lambda compiled=compiled: compiled(**inputs)  # type: ignore[misc]
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _synchronize(device)
            began = time.perf_counter()
            run()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    settings = {"layers": layers, "pixels": pixels, "rounds": rounds}
    return {"settings": settings, "seconds": seconds, "first": first, "bytes": size, "skipped": skipped}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step_table(result: dict[str, Any]) -> str:
    """Table of speeds and bytes as ratios to bfloat16."""
    base = f"{BASE}, compiled"
    rows = []
    for name, taken in result["seconds"].items():
        speed = statistics.median(b / own for b, own in zip(result["seconds"].get(base, taken), taken, strict=True))
        smaller = result["bytes"].get(base, result["bytes"][name]) / result["bytes"][name]
        rows.append([name, f"{speed:.2f}", f"{smaller:.2f}", f"{statistics.median(taken) * 1e3:.1f}",
                     f"{result['bytes'][name] / 1e6:.0f}", f"{result['first'][name]:.0f}"])  # fmt: skip
    said = "".join(f"\n{name}: {why}" for name, why in result["skipped"].items())
    return (
        markdown_table(["", f"speed against {base}", "times smaller", "ms / step", "MB", "first call, s"], rows) + said
    )


def main(
    tokens: Annotated[str, typer.Option(help="Comma-separated.")] = "4096,16384,1024,256,16",
    models: Annotated[str, typer.Option(help="Comma-separated, of those in SHAPES.")] = ",".join(SHAPES),
    layers: Annotated[int, typer.Option(help="Transformer blocks in the step.")] = 28,
    pixels: int = 1024,
    rounds: int = 11,
    minutes: Annotated[float, typer.Option(help="When to stop measuring.")] = 7.5,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measures and prints."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu measures an NVIDIA GPU, and this machine has none that PyTorch can use.")
    began = time.monotonic()
    until = began + 60 * minutes
    report: dict[str, Any] = {"environment": environment(), "gpu": gpu(), "gemm": [], "not measured": []}

    def write() -> None:
        write_text(out / "gpu.json", json.dumps(report, indent=1) + "\n")

    with torch.no_grad():
        report["step"] = step(layers, pixels, rounds, "cuda", began + 60 * minutes * 0.6)
        write()
        print(step_table(report["step"]), flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
        work = [
            (rows, shape)
            for rows in map(int, tokens.split(","))
            for name in models.split(",")
            for shape in SHAPES[name]
        ]
        for rows, (features, depth) in tqdm(work, desc="linears"):
            if time.monotonic() > until:
                report["not measured"].append([rows, features, depth])
                continue
            report["gemm"].append(measure(rows, features, depth, "cuda", rounds))
            write()
    write()
    print("\n" + gemm_table(report["gemm"]))
    if report["not measured"]:
        print(f"\nNo time was left for {len(report['not measured'])} of {len(work)} linears.")
    print(f"\n{report['gpu']['name']}; {one_line()}")


if __name__ == "__main__":
    typer.run(main)
