"""Scale searches by name, and observers of codebooks that nobody registered."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchao.quantization.granularity import PerGroup

from fp4dit_ao import QuantConfig, w4a6
from fp4dit_ao.config.quant_config import WEIGHT_SEARCHES
from fp4dit_ao.formats import CODEBOOKS, CodebookFormat, parse
from fp4dit_ao.observers import TokenActivationObserver, WeightObserver
from fp4dit_ao.observers.scale_search import (
    CLIPS,
    SEARCHES,
    absmax,
    lowbit_fp,
    mse,
    register_search,
    weighted_mse,
)

LEVELS = (-9, -5, -3, -1, 0, 2, 4, 8)


@pytest.fixture
def codebook() -> Iterator[CodebookFormat]:
    yield CodebookFormat("mine", LEVELS)
    CODEBOOKS.pop("mine", None)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_codebook_that_nobody_registered(codebook: CodebookFormat, as_list: bool) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    observer = WeightObserver([codebook] if as_list else codebook, PerGroup(32))
    found = observer.dequantized(weight)
    scale = weight.reshape(4, 2, 32).abs().amax(-1) / 9
    y = weight.double().reshape(4, 2, 32) / scale.double()[..., None]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = levels[(y[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(found.double(), (nearest * scale.double()[..., None]).reshape(4, 64))


def test_a_codebook_of_inputs_that_nobody_registered(codebook: CodebookFormat) -> None:
    observer = TokenActivationObserver(codebook)
    observer.fake_quantize = True
    assert torch.equal(
        observer(torch.tensor([[-9.0, 1.9, -4.0]])), torch.tensor([[-9.0, 2.0, -3.0]])
    )  # a tie to even code 2


def test_another_codebook_of_that_name_is_refused(codebook: CodebookFormat) -> None:
    WeightObserver(codebook)
    with pytest.raises(ValueError, match="codebook 'mine' has the name of another format"):
        WeightObserver(CodebookFormat("mine", (-1, 0)))


def test_configs_take_the_names_that_are_registered() -> None:
    assert list(SEARCHES) == WEIGHT_SEARCHES
    assert [(info.point, info.name) for info in SEARCHES.infos()] == [("scale search", name) for name in SEARCHES]
    with pytest.raises(ValueError, match="unknown scale search 'hessian'; choose one of absmax, mse"):
        WeightObserver("e2m1", search="hessian")


def test_a_search_of_ones_own() -> None:
    def doubled(weight, block_size, fmt, scale_dtype):
        return 2 * absmax(weight, block_size, fmt, scale_dtype)

    with pytest.raises(ValueError, match="weight_search='doubled'"):
        QuantConfig(weight_search="doubled")
    register_search("doubled", doubled, summary="a test")
    try:
        assert replace(w4a6(), weight_search="doubled").weight_search == "doubled"
        observer = WeightObserver("e2m1", PerGroup(2), search="doubled")
        observer(torch.tensor([[12.0, 3.0]]))
        assert observer.scale.item() == 2
    finally:
        del SEARCHES._methods["doubled"], SEARCHES._infos["doubled"]
        WEIGHT_SEARCHES.remove("doubled")


@pytest.mark.parametrize("fmt", ["e2m1", "e1m2", "e3m0", "int4"])
@pytest.mark.parametrize("block", [[-1, -1], [1, 64]])
def test_lowbit_fp_takes_the_best_of_111_clips(fmt: str, block: list[int]) -> None:
    """Against the paper's quantizer, by its bias: ``s(x) = 2^(p - b - M)``, ``p = max(1, floor(log2|x| + b))``, in NumPy."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[2, 5] = 40.0  # what a scale from absmax would be stretched by
    scale = lowbit_fp(weight, block, parse(fmt), torch.float32)
    groups = weight.double().reshape((1, -1) if block[0] < 0 else (16, 64)).numpy()
    best = []
    for group in groups:
        errors = []
        for c in np.linspace(0.1, 1.2, 111) * np.abs(group).max():
            rounded = integers(group, c) if fmt == "int4" else minifloat(group, c, int(fmt[1]), int(fmt[3]))
            errors.append((np.square(rounded - group).sum(), c))
        best.append(min(errors))
    largest = float(parse(fmt).lattice_max)
    for (error, _), group, found in zip(best, groups, scale.flatten().tolist(), strict=True):
        clip = found * largest
        ours = integers(group, clip) if fmt == "int4" else minifloat(group, clip, int(fmt[1]), int(fmt[3]))
        assert np.square(ours - group).sum() == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("block", [[-1, -1], [1, 32], [1, -1]], ids=["tensor", "group", "row"])
def test_weighted_mse_takes_the_best_of_all_clips_for_the_inputs_power(block: list[int]) -> None:
    fmt, generator = parse("e2m1"), torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=generator)
    importance = torch.randn(64, generator=generator).exp()
    size = [4 if block[0] < 0 else 1, 64 if block[1] < 0 else block[1]]
    scale = weighted_mse(weight, block, fmt, torch.float32, importance)
    assert scale.shape == (4 // size[0], 64 // size[1])
    levels, y, counts = (x.double().numpy() for x in (fmt.lattice, weight, importance))
    for row, column in np.ndindex(*scale.shape):
        rows, columns = (slice(i * n, (i + 1) * n) for i, n in zip((row, column), size, strict=True))
        part = y[rows, columns]

        def error(step: float, part: np.ndarray = part, columns: slice = columns) -> float:
            nearest = np.abs(part[..., None] / step - levels).min(-1) * step
            return float((np.square(nearest) * counts[columns]).sum())

        least = min(error(np.abs(part).max() / 12 * fraction) for fraction in (1.0, *CLIPS))
        assert error(scale[row, column].item()) == pytest.approx(least, rel=1e-5)
    without = weighted_mse(weight, block, fmt, torch.float32)
    assert torch.equal(without, mse(weight, block, fmt, torch.float32))


def integers(x: np.ndarray, c: float) -> np.ndarray:
    return np.clip(np.round(x / c * 7), -7, 7) * c / 7


def minifloat(x: np.ndarray, c: float, exponent: int, mantissa: int) -> np.ndarray:
    b = 2**exponent - np.log2(c) + np.log2(2 - 2.0**-mantissa) - 1
    clipped = np.clip(x, -c, c)
    p = np.maximum(1, np.floor(np.log2(np.abs(clipped) + 1e-30) + b + 1e-9))
    step = 2.0 ** (p - b - mantissa)
    return step * np.round(clipped / step)
