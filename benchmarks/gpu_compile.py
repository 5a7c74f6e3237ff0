"""Registers, spills and shared memory of the Triton kernels: ``python -m benchmarks.gpu_compile``.

No GPU is needed, since Triton ships NVIDIA's assembler. Every configuration of the linears that may be chosen is compiled, and
the decoding of codebook groups; no speed is measured.
"""

import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4dit_ao.kernels import fp8_attention
from fp4dit_ao.kernels.cuda import triton_attention, triton_codebook_linear, triton_decode
from fp4dit_ao.kernels.cuda.triton_linear import CONFIGS, Config, block_k, linear_kernel
from fp4dit_ao.util.markdown import markdown_table

FP8 = 89
"""Compute capability, times ten, from which GPUs have FP8 units."""
HEADS = (72, 128)
"""Features of a head of PixArt and of FLUX."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel, with bfloat16 output and a bias."""

    config: Config
    capability: int
    tokens: str = "i8"
    packed: bool = True
    group: int = 128


def variants(capabilities: Iterable[int], every: bool = True) -> Iterator[Variant]:
    """Every configuration with packed codes; the first of each kind also with levels, and with FP8 tokens where they
    exist.

    ``every=False`` yields only the first configuration of each kind.
    """
    for capability in capabilities:
        for configs in CONFIGS.values():
            yield from (Variant(config, capability) for config in (configs if every else configs[:1]))
            yield Variant(configs[0], capability, packed=False)
            if capability >= FP8:
                yield Variant(configs[0], capability, tokens="fp8e4nv")
                yield Variant(configs[0], capability, tokens="fp8e4nv", packed=False)
        yield Variant(CONFIGS[512][0], capability, group=112)
        if capability >= FP8:
            yield from (Variant(CONFIGS[512][0], capability, "fp8e4nv", packed, group=112) for packed in (True, False))


def compiled(variant: Variant) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the tensor core instructions of a variant."""
    weight = "*u8" if variant.packed else f"*{variant.tokens}"
    types = {
        "tokens": f"*{variant.tokens}",
        "token_scale": "*fp32",
        "weight": weight,
        "scale": "*fp32",
        "bias": "*bf16",
    }
    types |= {"out": "*bf16"} | dict.fromkeys(("M", "N", "K", "ROW", "GROUPS", "t0", "t1", "t2", "t3"), "i32")
    constants = {
        "GROUP": variant.group, "SCALE_ROWS": True, "PACKED": variant.packed, "BIAS": True,
        "ASSEMBLY": True, "BLOCK_M": variant.config.block_m, "BLOCK_N": variant.config.block_n,
        "BLOCK_K": block_k(variant.group),
    }  # fmt: skip
    options = {"num_warps": variant.config.warps, "num_stages": variant.config.stages}
    kernel = _compiled(linear_kernel, types, constants, ("N", "K", "ROW"), variant.capability, options)
    return {
        "capability": variant.capability, "config": str(variant.config), "tokens": variant.tokens,
        "packed": variant.packed, "group": variant.group, "instructions": products(kernel), **usage(kernel),
    }  # fmt: skip


def compiled_decoding(capability: int, group: int = 128, fp8: bool = False) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of the kernel that decodes codebook groups, to int8 or E4M3, and its byte
    look-ups."""
    types = {
        "qdata": "*i32",
        "index": "*u8",
        "tables": "*i32",
        "out": "*i32",
        "N": "i32",
        "K": "i32",
        "INDEX_ROW": "i32",
    }
    words = group // triton_decode.CODES_PER_WORD
    constants = {
        "GROUP": words, "UNITS": triton.next_power_of_2(words), "ROWS": triton_decode.ROWS, "WORDS": True,
        "ASSEMBLY": True, "FP8": fp8,
    }  # fmt: skip
    options = {"num_warps": triton_decode.WARPS}
    kernel = _compiled(triton_decode.decode_kernel, types, constants, ("N", "K"), capability, options)
    ptx = kernel.asm["ptx"]
    return {
        "capability": capability, "group": group, "fp8": fp8, "lookups": ptx.count("prmt.b32"),
        "stores of 16 bytes": len(re.findall(r"st\.global\S*v4\.b32", ptx)), **usage(kernel),
    }  # fmt: skip


def compiled_few_tokens(
    capability: int, config: triton_codebook_linear.Config, tokens: str, group: int = 128
) -> dict[str, Any]:
    """The kernel that decodes codebook groups as it multiplies: as :func:`compiled`, and whether the look-up's registers hold
    pairs of bytes of one row, which it takes for granted."""
    bare = config.splits > 1
    written = "*bf16" if not bare else "*i32" if tokens == "i8" else "*fp32"
    types = {"tokens": f"*{tokens}", "token_scale": "*fp32", "qdata": "*u8", "index": "*u8", "tables": "*i32"}
    types |= {"row_scale": "*fp32", "bias": "*bf16", "out": written}
    types |= dict.fromkeys(("M", "N", "K", "INDEX_ROW", "GROUPS", "PART"), "i32")
    constants = {
        "GROUP": group, "BIAS": not bare, "ASSEMBLY": True, "BARE": bare, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": triton_codebook_linear.block_k(group),
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    kernel = _compiled(triton_codebook_linear.codebook_linear_kernel, types, constants, ("N", "K"), capability, options)
    return {
        "capability": capability, "config": str(config), "tokens": tokens, "group": group, "instructions": products(kernel),
        "pairs of one row": pairs_of_one_row(kernel.asm["ttgir"]), **usage(kernel),
    }  # fmt: skip


def pairs_of_one_row(ttgir: str) -> bool:
    """Whether every look-up of bytes in Triton's own assembly has a layout whose registers come in twos along the row."""
    used = set(re.findall(r"elementwise_inline_asm.*-> tensor<\d+x\d+xi8, (#\w+)>, tensor", ttgir))
    layouts = [re.search(rf"^{re.escape(name)} = (.*)$", ttgir, re.MULTILINE) for name in used]
    kinds = (
        r"#ttg\.linear<\{register = \[\[0, 1\], \[\d+, \d+\]",
        r"#ttg\.blocked<\{sizePerThread = \[1, (4|8|16)\].*order = \[1, 0\]",
    )
    return bool(used) and all(found and any(re.match(kind, found[1]) for kind in kinds) for found in layouts)


def _few_token_types(capability: int, both: bool) -> tuple[str, ...]:
    if capability < FP8:
        return ("i8",)
    return ("i8", "fp8e4nv") if both else ("fp8e4nv",)


def few_token_variants(capability: int, every: bool) -> Iterator[tuple[triton_codebook_linear.Config, str, int]]:
    """Configurations, types of tokens and groups: all of the latter two for the first configuration of each kind."""
    for configs in triton_codebook_linear.CONFIGS.values():
        for config in configs if every else configs[:1]:
            for tokens in _few_token_types(capability, config is configs[0]):
                for group in (128, 32) if config is configs[0] else (128,):
                    if triton_codebook_linear.fits(config, group):
                        yield config, tokens, group


def compiled_attention(capability: int, config: triton_attention.Config, dim: int) -> dict[str, Any]:
    """Attention with FP8 scores for heads of ``dim`` features: as :func:`compiled`."""
    types = {"q": "*fp8e4nv", "q_scale": "*fp32", "k": "*fp8e4nv", "k_scale": "*fp32", "v": "*bf16", "out": "*bf16"}
    types |= {"HEADS": "i32", "QUERIES": "i32", "KEYS": "i32", "factor": "fp32"}
    first, rest = triton_attention.columns(dim)
    constants = {
        "WIDTH": fp8_attention.width(dim), "DIM": dim, "FIRST": first, "REST": rest, "EVEN": True,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    sizes = ("HEADS", "QUERIES", "KEYS")
    kernel = _compiled(triton_attention.attention_kernel, types, constants, sizes, capability, options)
    return {
        "capability": capability,
        "config": str(config),
        "dim": dim,
        "instructions": products(kernel),
        **usage(kernel),
    }


def _compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], multiples: Sequence[str], capability: int,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """``kernel`` for a GPU, whose pointers, and arguments named in ``multiples``, are multiples of 16."""
    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in multiples]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def products(kernel: Any) -> list[str]:
    """The tensor cores' instructions that a compiled kernel has."""
    return sorted(set(re.findall(r"w?gmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*", kernel.asm["ptx"])))


def usage(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes spilled from them, and bytes of shared memory of a compiled kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _usage(kernel.asm["cubin"]))
    assert found is not None
    return {"registers": int(found[1]), "spilled": int(found[2]), "shared": kernel.metadata.shared}


def _usage(binary: bytes) -> str:
    """Output of NVIDIA's cuobjdump about a program; its STACK is the memory that registers were spilled to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(
    capabilities: Annotated[str, typer.Option(help="Comma-separated.")] = "80,89,90,100",
    every: Annotated[bool, typer.Option(help="All configurations, or the first of each kind.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Compiles and prints."""
    rows: list[list[str]] = []

    def say(result: dict[str, Any], mark: str, kind: str, tile: str, warps: int, stages: int | str) -> None:
        if as_json:
            print(json.dumps(({mark: True} if mark else {}) | result))
        usage = str(result["registers"]), str(result["spilled"]), f"{result['shared'] / 1024:.0f}"
        rows.append([f"sm_{result['capability']}", kind, tile, str(warps), str(stages), *usage])

    for capability in map(int, capabilities.split(",")):
        for group, fp8 in itertools.product((128, 112), (False, True) if capability >= FP8 else (False,)):
            kind = f"decoding to {'E4M3' if fp8 else 'int8'}, groups of {group}"
            decoding = compiled_decoding(capability, group, fp8)
            say(decoding, "decoding", kind, f"{triton_decode.ROWS} rows", triton_decode.WARPS, "")
        for few, tokens, group in dict.fromkeys(few_token_variants(capability, every)):
            kind, tile = f"{tokens}, codebooks, groups of {group}", f"{few.block_n} x {few.block_m}, {few.splits} parts"
            result = compiled_few_tokens(capability, few, tokens, group)
            say(result, "few tokens", kind, tile, few.warps, few.stages)
        for attention in triton_attention.CONFIGS[: None if every else 1] if capability >= FP8 else ():
            for dim in HEADS:
                tile = f"{attention.block_m} x {attention.block_n}"
                result = compiled_attention(capability, attention, dim)
                say(result, "attention", f"attention, heads of {dim}", tile, attention.warps, attention.stages)
        for variant in dict.fromkeys(variants([capability], every)):
            config = variant.config
            kind = f"{variant.tokens}, {'packed' if variant.packed else 'levels'}, groups of {variant.group}"
            say(compiled(variant), "", kind, f"{config.block_n} x {config.block_m}", config.warps, config.stages)
    if not as_json:
        head = ["GPU", "operands", "features x tokens", "warps", "stages", "registers", "spilled, B", "shared, KiB"]
        print(markdown_table(head, rows))


if __name__ == "__main__":
    typer.run(main)
