"""Sets of codebooks: the built-in ones from their definition, every code and threshold against brute force."""

from collections.abc import Iterator

import pytest
import torch

from fp4dit_ao.formats import CODEBOOK_SETS, CodebookSet, codebook_set, parse, register_codebook_set
from fp4dit_ao.formats.codebook_groups import EXACT_LEVELS, levels_of

each_set = pytest.mark.parametrize("codebooks", CODEBOOK_SETS.values(), ids=str)
REPEATED = CodebookSet("repeated", (((-3, -3, -1, 0, 0, 0, 1, 2, 2, 5, 6, 7, 8, 9, 9, 9)),) * 16)


def nearest_exact(value: float) -> float:
    """Distance to the nearest integer that int8 and torch's E4M3 both hold, up to 120."""
    integers = torch.arange(-120, 121, dtype=torch.float32)
    held = integers[integers.to(torch.float8_e4m3fn).float() == integers].double()
    return float((held - value).abs().min())


def test_the_79_integers_are_those_that_torch_holds_in_e4m3() -> None:
    integers = torch.arange(-120, 121).float()
    held = integers[integers.to(torch.float8_e4m3fn).float() == integers]
    assert list(EXACT_LEVELS) == held.int().tolist()
    assert len(EXACT_LEVELS) == 79


def test_the_default_is_nf4_at_eight_sizes_and_mirrored() -> None:
    """From NF4's quantiles (arXiv 2305.14314): 120 * 0.88^j, each level one of the nearest integers that both types hold."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    above = torch.special.ndtri(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))[:-1]
    nf4 = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    books = codebook_set("nf4_groups").books
    for size in range(8):
        for level, value in zip(books[size], (nf4 * 120 * 0.88**size).tolist(), strict=True):
            assert abs(level - value) <= nearest_exact(value) + 1e-4
        assert books[8 + size] == tuple(-level for level in reversed(books[size]))


@pytest.mark.parametrize(("name", "fmt"), [("e2m1_groups", "e2m1"), ("e3m0_groups", "e3m0"), ("e1m2_groups", "e1m2")])
def test_shapes_of_formats_at_sixteen_sizes(name: str, fmt: str) -> None:
    lattice = parse(fmt).lattice.double()
    for step, book in enumerate(codebook_set(name).books):
        size = 120 * 2 ** (-step / 8)
        expected = (lattice / lattice.max() * size).tolist()
        levels = sorted(set(book))
        for value in expected:
            assert min(abs(level - value) for level in levels) <= nearest_exact(value) + 1e-9
        assert book == tuple(-level for level in reversed(book))


@each_set
def test_every_level_is_exact_on_both_units(codebooks: CodebookSet) -> None:
    levels = codebooks.tensor()
    assert codebooks.is_exact_in_e4m3
    assert codebooks.largest == int(levels.abs().max()) == 120
    assert torch.equal(levels.float().to(torch.float8_e4m3fn).float(), levels.float())
    assert (levels.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("codebooks", [*CODEBOOK_SETS.values(), REPEATED], ids=str)
def test_codes_against_brute_force(codebooks: CodebookSet) -> None:
    """All quarters of a step, which hold every level and every middle; equal distances go to the even code, equal levels to the
    first."""
    y = torch.arange(-130 * 4, 130 * 4 + 1) / 4
    index = torch.arange(16, dtype=torch.uint8)[:, None]
    codes = codebooks.encode(y.expand(16, -1), index)
    for place, book in enumerate(codebooks.books):
        firsts = [code for code in range(16) if code == 0 or book[code] != book[code - 1]]
        for value, code in zip(y.tolist(), codes[place].tolist(), strict=True):
            least = min(abs(level - value) for level in book)
            nearest = [c for c in firsts if abs(book[c] - value) == least]
            assert code in nearest
            if len(nearest) == 2 and any(c % 2 == 0 for c in nearest):
                assert code % 2 == 0
    assert codebooks.encode(torch.tensor([[torch.nan, 1e30, -torch.inf]]), index[:1]).tolist()[0][1:] == [
        max(c for c in range(16) if c == 0 or codebooks.books[0][c] != codebooks.books[0][c - 1]), 0,
    ]  # fmt: skip


@pytest.mark.parametrize("codebooks", [*CODEBOOK_SETS.values(), REPEATED], ids=str)
def test_brackets_against_brute_force(codebooks: CodebookSet) -> None:
    index = torch.arange(16, dtype=torch.uint8)[:, None]
    y = torch.linspace(0, 1, 321)[None] * 2 - 1
    bounds = codebooks.tensor().float()
    y = bounds[:, :1] + (y + 1) / 2 * (bounds[:, -1:] - bounds[:, :1])
    low, up, step = codebooks.bracket(y, index)
    for place, book in enumerate(codebooks.books):
        for value, a, b, gap in zip(
            y[place].tolist(), low[place].tolist(), up[place].tolist(), step[place], strict=True
        ):
            assert book[a] == max(level for level in book if level <= value)
            higher = [level for level in book if level > value]
            assert book[b] == (min(higher) if higher else book[a])
            lower = [level for level in book if level < book[a]]
            assert float(gap) == (min(higher) - book[a] if higher else book[a] - max(lower))
            assert a == book.index(book[a])
            assert b == book.index(book[b])


@each_set
def test_levels_of_groups(codebooks: CodebookSet) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, 24), generator=generator, dtype=torch.uint8)
    index = torch.randint(0, 16, (5, 3), generator=generator, dtype=torch.uint8)
    found = levels_of(codes, index, codebooks.tensor())
    for row in range(5):
        for column in range(24):
            assert found[row, column] == codebooks.books[index[row, column // 8]][codes[row, column]]


@pytest.mark.parametrize(
    ("books", "message"),
    [
        ((tuple(range(16)),) * 15, "has 15 codebooks with 16 levels; expected 16 with 16 each"),
        ((tuple(range(8)),) * 16, "has 16 codebooks with 8 levels"),
        ((*((tuple(range(16)),) * 15), tuple(reversed(range(16)))), "codebook 15 of set 'x' .* expected ascending"),
        ((tuple(range(-128, -112)),) * 16, "expected ascending integers from -127 to 127"),
    ],
)
def test_what_is_no_set_is_refused(books: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookSet("x", books)


@pytest.fixture
def mine() -> Iterator[CodebookSet]:
    yield register_codebook_set(CodebookSet("mine_groups", REPEATED.books))
    del CODEBOOK_SETS["mine_groups"]


def test_sets_by_name(mine: CodebookSet) -> None:
    assert codebook_set("mine_groups") is mine
    assert register_codebook_set(CodebookSet("mine_groups", REPEATED.books)) == mine
    for name in ("nf4", "e2m1", "nf4_groups"):
        with pytest.raises(ValueError, match="has the name of another format"):
            register_codebook_set(CodebookSet(name, REPEATED.books))
    with pytest.raises(ValueError, match="unknown codebook set 'e2m1'; choose one of nf4_groups, e2m1_groups"):
        codebook_set("e2m1")
