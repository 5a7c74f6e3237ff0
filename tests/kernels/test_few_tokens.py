"""The kernel that decodes codebook groups as it multiplies: on a GPU if there is one, else in Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit_ao.formats import CODEBOOK_SETS, parse
from fp4dit_ao.kernels import decoded_linear
from fp4dit_ao.kernels.codebook_linear import decode, reference_codebook_linear
from fp4dit_ao.kernels.cuda import int8_linear as cuda_units
from tests.kernels.test_codebook_linear import bits, problem

pytest.importorskip("triton", reason="Triton has no build for this platform")
gpu_compile = pytest.importorskip("benchmarks.gpu_compile")
triton_codebook_linear = pytest.importorskip("fp4dit_ao.kernels.cuda.triton_codebook_linear")
interpreter = pytest.importorskip("tests.kernels.interpreter")
DEVICE = interpreter.DEVICE
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.loaded("triton_codebook_linear")


def on_device(p: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in p.items()}


def weight(p: dict[str, Any]) -> tuple[Any, ...]:
    return p["qdata"], p["index"], p["codebooks"], p["group_size"]


@settings(max_examples=8)
@given(
    rows=st.integers(1, 40), features=st.integers(1, 70), groups=st.integers(1, 5), group=st.sampled_from([32, 96, 128, 256]),
    splits=st.integers(1, 5), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_are_exact(
    kernel: Any, rows: int, features: int, groups: int, group: int, splits: int, seed: int
) -> None:
    p = problem(rows, features, groups, group, seed)
    expected = p["tokens"].int() @ decode(*weight(p)).int().T
    config = kernel.Config(block_n=32, block_m=16, splits=splits, warps=4, stages=2)
    found = kernel.product(on_device(p)["tokens"], *weight(on_device(p)), config).cpu()
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_give_the_specifications_bits(kernel: Any, splits: int, dtype: torch.dtype, bias: bool) -> None:
    p = problem(20, 48, 3, 64, dtype=dtype)
    p["bias"] = p["bias"] if bias else None
    config = kernel.Config(block_n=64, block_m=32, splits=splits, warps=4, stages=2)
    given = on_device(p)
    found = kernel.linear(
        given["tokens"], given["token_scale"], *weight(given)[:3], given["row_scale"], given["bias"], 64, dtype, config
    ).cpu()
    expected = reference_codebook_linear(**p)
    if (
        DEVICE == "cuda" or dtype == torch.bfloat16
    ):  # GPUs fuse products and sums; Triton's interpreter cuts bfloat16 off
        step = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected.float(), rtol=step, atol=step * float(expected.abs().max()) / 64)
    else:
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("name", CODEBOOK_SETS)
def test_fp8_levels_are_the_formats(kernel: Any, name: str) -> None:
    """Sums below 2^24 half steps are exact in float32; a GPU's accumulator rounds them."""
    p = problem(17, 40, 2, 128)
    p["codebooks"] = CODEBOOK_SETS[name].tensor()
    tokens = parse("e2m3").round(p["tokens"].float() / 2)
    expected = tokens.double() @ decode(*weight(p)).double().T
    config = kernel.Config(block_n=64, block_m=32, splits=2, warps=4, stages=2)
    found = kernel.product(tokens.to(FP8).to(DEVICE), *weight(on_device(p)), config).cpu().double()
    tolerance = 0.0 if DEVICE == "cpu" else 2**-10
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_strides_and_no_rows(kernel: Any) -> None:
    p = problem(5, 40, 2, 32)
    given = on_device(p)
    columns = [x.T.contiguous().T for x in (given["tokens"], *weight(given)[:3])]
    config = kernel.CONFIGS[32][1]
    assert torch.equal(kernel.product(*columns, 32, config).cpu(), p["tokens"].int() @ decode(*weight(p)).int().T)
    for shape in ((0, 40), (5, 0)):
        tokens, qdata, index = given["tokens"][: shape[0]], given["qdata"][: shape[1]], given["index"][: shape[1]]
        assert kernel.product(tokens, qdata, index, given["codebooks"], 32, config).shape == shape


def test_candidates_fit_their_groups(kernel: Any) -> None:
    """A thread looks up four bytes at once, two of them in one row at least."""
    for rows in (1, 32, 33, 300, 1024):
        for group in (32, 64, 96, 128, 512):
            for config in kernel.candidates(rows, group, 3):
                span = kernel.block_k(group)
                assert group % span == 0
                assert config.block_n * span // 2 >= 4 * 32 * config.warps
                assert config.splits <= 3
    assert kernel.candidates(300, 128, 9)
    assert not kernel.candidates(1025, 128, 9)
    assert not kernel.candidates(5, 48, 9)


def test_the_fastest_is_measured_once(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding first is one of the candidates; nothing is timed while a CUDA graph is captured."""
    timed: list[Any] = []

    def tune(configs: Any, launch: Any, what: str) -> Any:
        timed.append(configs)
        return configs[-1]

    monkeypatch.setattr(kernel, "tune", tune)
    monkeypatch.setattr(kernel, "_FASTEST", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tokens = torch.zeros(20, 256, dtype=torch.int8)
    first = kernel.chosen(tokens, 64, 128, lambda config: tokens)
    assert first == kernel.candidates(20, 128, 2)[0] and not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert kernel.chosen(tokens, 64, 128, lambda config: tokens) is None
    (configs,) = timed
    assert configs[-1] is None and len(configs) > 2
    many = torch.zeros(kernel.MOST_ROWS + 1, 256, dtype=torch.int8)
    assert kernel.chosen(many, 64, 128, lambda config: many) is None and len(timed) == 1
    wrong = kernel.candidates(200, 128, 2)[0]
    some = torch.ones(200, 256, dtype=torch.int8)
    kernel.chosen(some, 64, 128, lambda config: some + (config == wrong))
    assert wrong not in timed[-1] and len(timed[-1]) > 2, "one that computes something else is never taken"


@pytest.mark.parametrize("decode_first", [True, False])
def test_operators_take_what_is_chosen(kernel: Any, decode_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(9, 48, 2, 128, dtype=torch.float32)
    given = on_device(p)
    used: list[Any] = []

    def chosen(tokens: Tensor, features: int, group_size: int, launch: Any) -> Any:
        used.append((tuple(tokens.shape), features, group_size))
        return None if decode_first else kernel.CONFIGS[32][0]

    few = SimpleNamespace(chosen=chosen, product=kernel.product, linear=kernel.linear)
    monkeypatch.setattr(decoded_linear, "_few_tokens", lambda tokens, group_size: few)
    got = decoded_linear.codebook_product(given["tokens"], *weight(given)).cpu()
    assert torch.equal(got, p["tokens"].int() @ decode(*weight(p)).int().T)
    tokens = (p["tokens"].clamp(-15, 15)).to(FP8).to(DEVICE)
    codebooks = CODEBOOK_SETS["nf4_groups"].tensor().to(DEVICE)
    y = decoded_linear.fp8_codebook_linear(
        tokens, given["token_scale"], given["qdata"], given["index"], codebooks, given["row_scale"], given["bias"], 128
    ).cpu()
    p |= {"tokens": p["tokens"].clamp(-15, 15), "codebooks": codebooks.cpu()}
    exact = reference_codebook_linear(**p).double()
    assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() < 2**-8 * exact.norm()
    assert used == [((9, 256), 48, 128)] * 2


def test_older_gpus_decode_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_units, "decodes", lambda device, group_size: False)
    p = problem(3, 16, 2, 32)
    assert torch.equal(
        decoded_linear.codebook_product(p["tokens"], *weight(p)), p["tokens"].int() @ decode(*weight(p)).int().T
    )


@pytest.mark.parametrize("most", [32, 128, 512, 1024])
def test_codes_are_looked_up_in_pairs_of_one_row_in_every_tile(most: int) -> None:
    """Layouts differ with the tile: a wrong one would look codes up in another row's table."""
    for config in triton_codebook_linear.CONFIGS[most]:
        result = gpu_compile.compiled_few_tokens(90, config, "fp8e4nv")
        assert result["pairs of one row"] and not result["spilled"], result
