"""Messages of errors as one sentence."""

import pytest

from fp4dit_ao.util.sentences import first_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no such file", "no such file"),
        ("\n  damaged\nTraceback …", "damaged"),
        ("wrong 'd_model':\n    TypeError: expected int\nmore", "wrong 'd_model': TypeError: expected int"),
        ("one:\ntwo:\nthree", "one: two: three"),
        ("nothing follows:", "nothing follows:"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
    ],
)
def test_one_sentence_of_an_error(message: str, expected: str) -> None:
    assert first_line(ValueError(message)) == expected
