"""Regular Hadamard rotations: the matrix and its sums, rows that stand out, widths, the function that stays."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fp4dit_ao import capture, transform
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.transforms.hadamard import Hadamard, rotate, rotation
from fp4dit_ao.passes.transforms.regular_hadamard import RegularHadamard, regular_block, regular_rotation
from tests.graphs import show
from tests.passes.transforms.layers import Layer, quantized, relative

INT4 = replace(RECIPES["int_w4a4"](), skip=())


@pytest.mark.parametrize("block", [16, 64, 256])
def test_all_rows_and_columns_have_one_sum(block: int) -> None:
    matrix = regular_rotation(block)
    root = math.isqrt(block)
    ones = (matrix * root).numpy()
    assert set(np.unique(ones)) == {-1.0, 1.0}
    np.testing.assert_array_equal(ones.sum(0), root)
    np.testing.assert_array_equal(ones.sum(1), root)
    np.testing.assert_array_equal(matrix.double().numpy() @ matrix.double().numpy(), np.eye(block))
    # the paper's theorem 3.1, for this matrix and for Sylvester's, whose sum is all in one column
    for found in (ones, (rotation(block) * rotation(block).sign()[:, :1] / rotation(block)[0, 0].abs()).numpy()):
        assert (found.sum(0) ** 2).sum() == block**2
        assert np.abs(found.sum(0)).max() >= root


def test_blocks_are_powers_of_four() -> None:
    assert [regular_block(width) for width in (1152, 4608, 1408, 3072, 256, 128, 24, 7)] == [
        64,
        256,
        64,
        1024,
        256,
        64,
        4,
        1,
    ]


def test_a_row_of_equal_channels_stays_and_an_outlier_is_spread() -> None:
    row = torch.full((256,), 3.0)
    assert torch.equal(rotate(row, regular_rotation(256)), row)
    signless = rotation(256).abs()[0, 0] * torch.ones(256)  # Sylvester's first column, without signs by chance
    assert float(row @ signless) == 3.0 * 256 / 16, "sixteen times the size, in one channel"
    outlier = torch.zeros(256)
    outlier[77] = 16.0
    assert torch.equal(rotate(outlier, regular_rotation(256)).abs(), torch.ones(256))


@torch.no_grad()
def test_the_function_stays_and_records_are_replayed() -> None:
    torch.manual_seed(0)
    model, sample = Layer(192).eval(), {"x": torch.randn(2, 5, 192)}
    method = RegularHadamard(everywhere=True)
    graph = transform(capture(model, sample), [sample], [method], replace(INT4, group_size=64), progress=False)
    assert "unflatten_int = unflatten.int(x, -1, [3, 64])" in show(graph)
    assert torch.equal(graph.get_buffer("one.rotation"), regular_rotation(64))
    assert relative(graph(**sample), model(**sample)) < 2e-6
    fresh = capture(model, sample)
    RegularHadamard.from_record(method.to_record()).apply(fresh)
    assert torch.equal(fresh.get_buffer("one.rotation"), torch.eye(64)), "until the stored matrix comes"
    assert torch.equal(fresh(**sample), model(**sample))


@pytest.mark.parametrize("recipe", ["int_w4a4", "w4a4", "w4a4_codebook"])
@torch.no_grad()
def test_rows_that_stand_out_err_less_than_by_sylvesters_matrix(recipe: str) -> None:
    """Tokens with large channels of one sign, beside others: QuaRot's matrix without its signs sums them up."""
    generator = torch.Generator().manual_seed(0)
    model = Layer(256).eval()
    sample, held_out = ({"x": torch.randn(2, 48, 256, generator=generator)} for _ in range(2))
    for values in (sample, held_out):
        values["x"][:, ::4] += 6
        values["x"][..., 9] *= 20
    config = replace(RECIPES[recipe](), skip=())
    expected, errors = model(**held_out), {}
    methods = {"none": [], "regular": [RegularHadamard()], "sylvester": [_Unsigned(block=256, everywhere=True)]}
    for name, transforms in methods.items():
        graph = transform(capture(model, sample), [sample], transforms, config, progress=False)
        errors[name] = relative(quantized(graph, config, sample)(**held_out), expected)
    assert errors["regular"] < 0.9 * errors["none"]
    assert errors["regular"] < 0.9 * errors["sylvester"]


class _Unsigned(Hadamard):
    def matrix(self, block: int) -> torch.Tensor:
        signed = rotation(block)
        return signed * signed[:, :1].sign()


def test_refusals() -> None:
    for wrong in (128, 4, 96):
        with pytest.raises(ValueError, match=f"RegularHadamard: block={wrong}; it must be a power of 4 from 16 on"):
            RegularHadamard(block=wrong)
    model, sample = Layer().eval(), {"x": torch.randn(1, 4, 128)}
    graph = transform(capture(model, sample), [sample], [Hadamard(everywhere=True)], INT4, progress=False)
    with pytest.raises(ValueError, match=r"rotated already: it has one\.rotation; apply regular_hadamard once"):
        transform(graph, [sample], ["regular_hadamard"], INT4, progress=False)
