"""The user's cache: where platforms keep it; what cannot be read is as good as missing, and what cannot be written is said."""

from pathlib import Path

import pytest

from fp4dit_ao.util import user_cache
from fp4dit_ao.util.user_cache import VARIABLE, cache_folder, read_json, write_json


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/fp4dit-ao"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/fp4dit-ao"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "~/Library/Caches/fp4dit-ao"),
        ("win32", {}, "~/AppData/Local/fp4dit-ao"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fp4dit-ao"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere", VARIABLE: "/mine"}, "/mine"),
    ],
)
def test_it_is_where_the_platform_keeps_caches(platform, variables, expected, monkeypatch) -> None:
    monkeypatch.setattr(user_cache.sys, "platform", platform)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected).expanduser()


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1'])
def test_what_cannot_be_read_is_empty_and_is_written_anew(damage, tmp_path) -> None:
    path = tmp_path / "new" / "kept.json"
    if damage is not None:
        path.parent.mkdir()
        path.write_bytes(damage)
    assert read_json(path) == {}
    write_json(path, {"a": [1.5, "b"]})
    assert read_json(path) == {"a": [1.5, "b"]}
    assert [found.name for found in path.parent.iterdir()] == ["kept.json"]


def test_a_place_that_cannot_be_written_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=f"results are not kept for the next time: cannot save to .*{VARIABLE}"):
        write_json(tmp_path / "file" / "kept.json", {})
