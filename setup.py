"""What pyproject.toml cannot say: the wheel's tag, the name of the C library, and the README as a package index shows it."""

import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:)([^)\s]+)\)")


class AnyPython(bdist_wheel):
    """Tags wheels ``py3-none-PLATFORM``: the C library includes no header of Python, and one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag's three parts."""
        return "py3", "none", super().get_tag()[2]


class PlainLibrary(build_ext):
    """Names the C library without the version of Python that built it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library ``fullname`` in the package."""
        suffix = Path(super().get_ext_filename(fullname)).suffix
        return str(Path(*fullname.split(".")).with_suffix(suffix))


def described(text: str, repository: str | None) -> str:
    """The README for a page that has no files beside it.

    Args:
        text: Markdown whose links to files are relative.
        repository: address of the repository, to which links then lead; if None, a link becomes its text, and a picture is
            left out.
    """

    def moved(match: re.Match[str]) -> str:
        picture, shown, target = match.groups()
        if repository is not None:
            return f"{picture}[{shown}]({repository}/{'raw' if picture else 'blob'}/main/{target})"
        return "" if picture else shown

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    moved_pieces = (piece if piece.startswith("```") else _LINK.sub(moved, piece) for piece in pieces)
    return re.sub(r"\n{3,}", "\n\n", "".join(moved_pieces))


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        cmdclass={"bdist_wheel": AnyPython, "build_ext": PlainLibrary},
        long_description=described(
            (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Source")
        ),
        long_description_content_type="text/markdown",
    )
