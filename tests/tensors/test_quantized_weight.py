"""Slices, joins and views of quantized weights give the same values as those of the float weight that they stand for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4dit_ao import MinifloatTensor, _compat
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

ROWS, COLUMNS, GROUP = 48, 256, 64


def make(kind: str, block: tuple[int, int] = (1, GROUP), act_fmt: str | None = "e2m3", seed: int = 0) -> Any:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    packed = MinifloatTensor.from_hp(weight, list(block), "e2m3" if kind == "bytes" else "e2m1", act_fmt)
    return LevelTensor.from_packed(packed, kind) if kind in ("int8", "fp8") else packed


each_kind = pytest.mark.parametrize("kind", ["nibbles", "bytes", "int8", "fp8"])
each_mode = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


@each_kind
@each_mode
@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[3:7], lambda w: w[5:], lambda w: w[:-3], lambda w: w[7:3], lambda w: w.narrow(0, 1, 9),
        lambda w: w[:, 64:192], lambda w: w[:, -128:], lambda w: w[3:9, 64:128], lambda w: w.narrow(1, 128, 64),
        lambda w: w.t(), lambda w: w.T, lambda w: w.mT, lambda w: w.transpose(0, 1), lambda w: w.permute(1, 0),
        lambda w: w.transpose(-2, -1).t(), lambda w: w.permute(0, 1), lambda w: w.transpose(1, 1),
        lambda w: w.t()[64:128], lambda w: w.t()[:, 3:5], lambda w: w.t()[64:128].t(),
        lambda w: w.view(ROWS, COLUMNS), lambda w: w.view(-1, COLUMNS), lambda w: w.detach(), lambda w: w.clone(),
        lambda w: w.contiguous(),
        lambda w: w.chunk(5)[4], lambda w: w.chunk(2, 1)[1], lambda w: w.split(10)[4], lambda w: w.split([1, 47])[1],
        lambda w: w.split([64, 192], dim=1)[1], lambda w: w.t().chunk(2)[0],
        lambda w: torch.cat([w, w[3:5]]), lambda w: torch.cat([w, w[:, 64:128]], 1), lambda w: torch.cat([w.t(), w.t()], 1),
        lambda w: torch.cat([w[:1], w[1:]]),
    ],
)  # fmt: skip
def test_views_have_the_values_of_the_float_weights_views(kind: str, view: Callable[[Any], Any], grad: bool) -> None:
    weight = make(kind)
    with torch.set_grad_enabled(grad):
        got, expected = view(weight), view(weight.dequantize())
    assert type(got) is type(weight)
    assert got.shape == expected.shape
    assert torch.equal(got.dequantize(), expected)


@each_kind
def test_views_share_memory_and_copies_do_not(kind: str) -> None:
    weight = make(kind)
    views, copy = [weight[3:7], weight.t(), weight.chunk(2)[0], weight.detach()], weight.clone()
    before = copy.dequantize()
    weight.qdata.zero_()
    assert all((view.qdata.float() == 0).all() for view in views)
    assert torch.equal(copy.dequantize(), before)


@each_kind
@pytest.mark.parametrize("block", [(1, GROUP), (1, -1), (-1, -1)])
@pytest.mark.parametrize(
    "part", [lambda w: w[5:29], lambda w: w[:, 64:192], lambda w: w[:, :64]], ids=["rows", "two", "one"]
)
def test_a_part_computes_what_the_whole_computes_of_it(
    kind: str, block: tuple[int, int], part: Callable[[Any], Any]
) -> None:
    weight = make(kind, block)
    piece = part(weight)
    x, bias = torch.randn(3, 5, piece.shape[1]), torch.randn(piece.shape[0])
    again = piece.map_data(lambda part: part.clone())
    assert torch.equal(F.linear(x, piece, bias), F.linear(x, again, bias)), "strides do not matter"
    if piece.shape[1] == COLUMNS:
        assert torch.equal(F.linear(x, piece, bias), F.linear(x, weight, F.pad(bias, (5, ROWS - 29)))[..., 5:29])
    exact = F.linear(rounded(x, weight.act_fmt), piece.dequantize(torch.float32).double(), bias.double())
    assert torch.allclose(F.linear(x, piece, bias).double(), exact, rtol=1e-5, atol=1e-4)


def rounded(x: Tensor, fmt: str) -> Tensor:
    """float64 values of the tokens after quantization."""
    ops = torch.ops.fp4dit_ao
    block = [1] * (x.ndim - 1) + [-1]
    scale = ops.choose_scale(x, block, fmt, torch.float32)
    return ops.dequantize(ops.quantize(x, block, scale, fmt), block, scale, fmt, torch.float32).double()


@each_kind
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: w[:, 2:66], r"columns 2 to 66 .* inside an element of scale, which stands for 64; slice at multiples of 64"),
        (lambda w: w[:, :32], r"columns 0 to 32 .* element of scale"),
        (lambda w: w.chunk(3, 1), "columns 0 to 86"),
        (lambda w: w.t()[:32], r"\(256, 48\): columns 0 to 32"),
        (lambda w: w[::2], "step 2; expected consecutive"),
        (lambda w: w[3], r"dimension 0 cannot be dropped; take weight\[3:4\]"),
        (lambda w: w.view(-1), r"cannot be viewed as \(-1,\)"),
        (lambda w: w.view(COLUMNS, ROWS), "cannot be viewed as"),
        (lambda w: torch.cat([w, torch.zeros(2, COLUMNS)]), "cat: found .*'Tensor'.*; expected weights of one kind"),
        (lambda w: torch.cat([w, w[:, :64]]), r"cat along dimension 0 with \(48, 64\)"),
        (lambda w: torch.cat([w, w.with_parts(act_fmt="int8")]), "act_fmt is int8, not e2m3"),
        (lambda w: F.linear(torch.zeros(2, ROWS), w.t()), "a transposed weight cannot be that of a linear"),
        (lambda w: torch.zeros(2, ROWS) @ w, "only x @ weight.t()"),
        (lambda w: w @ torch.zeros(COLUMNS, 2), "only x @ weight.t()"),
        (lambda w: torch.addmm(torch.zeros(ROWS), torch.zeros(2, COLUMNS), w.t(), alpha=2), "expected alpha = beta = 1"),
        (lambda w: F.linear(w, torch.zeros(2, COLUMNS)), "a quantized tensor must be the weight"),
        (lambda w: w.copy_(w[:3]), r"copy_ of a \w+ \(3, 256\); expected the same kind and shape"),
        (lambda w: w.copy_(w.dequantize()), "copy_ of a Tensor"),
        (lambda w: w.copy_(w.with_parts(act_fmt="int8")), "act_fmt is int8, not e2m3"),
    ],
)  # fmt: skip
def test_what_would_change_values_is_refused_in_a_sentence(
    kind: str, wrong: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(make(kind))


@pytest.mark.parametrize(("kind", "allowed"), [("nibbles", False), ("bytes", True), ("int8", True)])
def test_columns_between_bytes_need_no_group(kind: str, allowed: bool) -> None:
    """One scale a row: two codes of a byte are all that stays together."""
    weight = make(kind, (1, -1))
    assert torch.equal(weight[:, 2:8].dequantize(), weight.dequantize()[:, 2:8])
    if allowed:
        assert torch.equal(weight[:, 3:8].dequantize(), weight.dequantize()[:, 3:8])
    else:
        with pytest.raises(
            ValueError, match=r"columns 3 to 8 .* of qdata, which stands for 2; slice at multiples of 2"
        ):
            weight[:, 3:8]


@pytest.mark.parametrize(
    ("block", "dim", "scales"), [((1, -1), 1, "columns"), ((-1, -1), 0, "rows"), ((-1, -1), 1, "columns")]
)
def test_weights_under_one_scale_are_not_joined(block: tuple[int, int], dim: int, scales: str) -> None:
    with pytest.raises(ValueError, match=f"cat along {scales} where one scale stands for all of them"):
        torch.cat([make("nibbles", block), make("nibbles", block)], dim)


@each_kind
def test_products_with_the_transposed_weight_are_linears(kind: str) -> None:
    weight, x, bias = make(kind), torch.randn(3, 5, COLUMNS), torch.randn(ROWS)
    assert torch.equal(x @ weight.t(), F.linear(x, weight))
    assert torch.equal(torch.mm(x[0], weight.T), F.linear(x[0], weight))
    assert torch.equal(torch.addmm(bias, x[0], weight.t()), F.linear(x[0], weight, bias))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", ["matrix", "weight", "number"])
def test_a_sum_is_a_float_tensor(kind: str, dtype: torch.dtype, added: str) -> None:
    weight = make(kind).to(dtype)
    x = {"matrix": torch.randn(ROWS, COLUMNS, dtype=dtype, requires_grad=True), "weight": make(kind, seed=1).to(dtype)}
    other: Any = x.get(added, 0.5)
    values = other.dequantize() if added == "weight" else other
    for found, expected in (
        (weight + other, weight.dequantize() + values),
        (other + weight.t().t(), values + weight.dequantize()),
        (torch.add(weight, other, alpha=2), torch.add(weight.dequantize(), values, alpha=2)),
    ):
        assert type(found) is Tensor
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    if added == "matrix":
        (weight + other).sum().backward()
        assert torch.equal(other.grad, torch.ones(ROWS, COLUMNS, dtype=dtype))


@each_kind
def test_memory_is_made_and_filled(kind: str) -> None:
    weight, other = make(kind), make(kind, seed=1)
    empty = torch.empty_like(weight)
    assert type(empty) is type(weight) and empty.shape == weight.shape and empty.dtype == weight.dtype
    assert empty.qdata.data_ptr() != weight.qdata.data_ptr()
    assert empty.copy_(weight) is empty
    assert torch.equal(empty.dequantize(), weight.dequantize())
    empty[3:7].copy_(other[3:7])
    assert torch.equal(empty.dequantize()[3:7], other.dequantize()[3:7])
    assert torch.equal(empty.dequantize()[7:], weight.dequantize()[7:])
    assert torch.empty_like(weight, device="meta").qdata.is_meta
    assert torch.empty_like(weight, dtype=torch.bfloat16).dtype == torch.bfloat16


@each_kind
def test_whether_gradients_are_asked_for(kind: str) -> None:
    weight = make(kind)
    arguments = [getattr(weight, name) for name in _compat.parts(type(weight))]
    assert not weight.requires_grad
    asking = type(weight)(*arguments, requires_grad=True)
    assert asking.requires_grad and asking.is_leaf
    assert asking[3:5].requires_grad and not asking.detach().requires_grad
    assert nn.Parameter(weight, requires_grad=True).requires_grad
    assert not nn.Parameter(weight, requires_grad=False)[3:5].requires_grad


@each_kind
def test_the_cache_key_knows_all_that_shapes_code(kind: str) -> None:
    weight = make(kind)
    keys = [x._stable_hash_for_caching() for x in (weight, weight[:7], weight.t(), weight.to(torch.bfloat16))]
    assert len(set(keys)) == 4
    assert make(kind)._stable_hash_for_caching() == keys[0]


def test_a_weight_of_another_layout_needs_only_its_tiles() -> None:
    """A table that all share and a packed index with two groups a byte, as codebook groups have them."""

    class Indexed(QuantizedWeight):
        tensor_data_names = ["index", "table"]  # noqa: RUF012
        tensor_attribute_names = ["dtype"]  # noqa: RUF012

        def __new__(cls, index: Tensor, table: Tensor, dtype: torch.dtype, transposed: bool = False) -> "Indexed":
            shape = [index.shape[0], index.shape[1] * 2 * 8]
            return _compat.wrapper_tensor(cls, shape[::-1] if transposed else shape, dtype, index.device)

        def __init__(self, index: Tensor, table: Tensor, dtype: torch.dtype, transposed: bool = False) -> None:
            self.index, self.table, self.transposed = index, table, transposed

        def tiles(self) -> dict[str, tuple[int, int] | None]:
            return {"index": (1, 16), "table": None}

        def stored_values(self, output_dtype: torch.dtype) -> Tensor:
            books = torch.stack([self.index & 15, self.index >> 4], -1).flatten(1)
            return self.table[books.long()].repeat_interleave(8, 1).to(output_dtype)

    index = torch.randint(0, 256, (6, 4), dtype=torch.uint8)
    weight = Indexed(index, torch.randn(16), torch.float32)
    values = weight.dequantize()
    assert torch.equal(weight[2:5, 16:48].dequantize(), values[2:5, 16:48])
    assert torch.equal(torch.cat([weight, weight[:2]]).dequantize(), torch.cat([values, values[:2]]))
    assert weight[1:3].table is weight.table
    with pytest.raises(
        ValueError, match=r"Indexed \(6, 64\): columns 8 to 16 .* element of index, which stands for 16"
    ):
        weight[:, 8:16]
    with pytest.raises(ValueError, match="cat with a weight of another table, which all of a weight shares"):
        torch.cat([weight, Indexed(index, torch.randn(16), torch.float32)])
