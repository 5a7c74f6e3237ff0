"""Amounts of memory are read as people write them."""

import pytest

from fp4dit_ao.util.byte_sizes import byte_count


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, 5), ("5", 5), ("8GB", 8_000_000_000), ("8 gb", 8_000_000_000), ("1.5GiB", 1_610_612_736), ("800MB", 800_000_000),
        (".5kb", 500),
    ],
)  # fmt: skip
def test_a_number_and_a_unit(size: int | str, expected: int) -> None:
    assert byte_count(size) == expected


@pytest.mark.parametrize("size", ["", "lots", "8 XB", "-1GB", "0", 0, "1e9", "0.1", True])
def test_what_is_no_amount_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory; give a number and a unit, such as 8GB"):
        byte_count(size)
