"""What ``torch.compile`` lacks on a machine is said in words, and commands that compile by default go without."""

import os
import sysconfig
from pathlib import Path

import pytest

from fp4dit_ao.cli.compilation import compile_if_possible, missing_for_compilation


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a C++ compiler alone in its PATH, and Python's header."""
    headers, programs = tmp_path / "include", tmp_path / "bin"
    headers.mkdir()
    programs.mkdir()
    (headers / "Python.h").touch()
    compiler = programs / "g++"
    compiler.touch(0o755)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    return compiler


def test_nothing_is_missing(compiler: Path) -> None:
    assert missing_for_compilation() is None
    assert compile_if_possible(True, "cpu")
    assert not compile_if_possible(False, "cpu")


def test_a_compiler_by_another_name(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler.rename(compiler.with_name("c++"))  # which Inductor does not look for
    assert missing_for_compilation() == "no C++ compiler (g++): install one, or name it in CXX"
    monkeypatch.setenv("CXX", str(compiler))
    assert missing_for_compilation() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_for_compilation() == "no C++ compiler (no-such-compiler): install one, or name it in CXX"


def test_commands_go_without(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    os.remove(header)
    assert not compile_if_possible(True, "cpu")
    assert f"There is no Python.h in {header.parent}: install python3-dev" in capsys.readouterr().out
    assert compile_if_possible(True, "cuda")  # where Triton compiles, with other programs
    assert not capsys.readouterr().out
