"""mkdocs' hooks: pages that stand at the top of the repository, links out of docs/, and the tree that docstrings come from."""

import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site by the file that they show."""

_TREE = tempfile.TemporaryDirectory(prefix="fp4dit_ao-docs-")

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """The package as it is installed, passes/ and observers/ inside: what mkdocstrings reads, without importing it."""
    package = Path(_TREE.name) / "fp4dit_ao"
    shutil.rmtree(package, ignore_errors=True)  # of the build before, under `mkdocs serve`
    for folder, place in (
        (ROOT / "fp4dit_ao", package),
        *((ROOT / name, package / name) for name in ("passes", "observers")),
    ):
        for path in folder.rglob("*.py"):
            copy = place / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [_TREE.name]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of :data:`PAGES`, and the pictures that they show."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
        for image, _, target in _LINK.findall(text):
            path = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if image and path.is_file():
                files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them: to its pages, to the repository if mkdocs.yml names one, or else their text alone."""
    name = page.file.src_uri
    source = PAGES.get(name, f"docs/{name}")
    shown = {path: name for name, path in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it does not exist
        inside = shown.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else path)
        if files.get_file_from_path(inside):
            relative = posixpath.relpath(inside, posixpath.dirname(name) or ".")
            return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if piece.startswith("```") else _LINK.sub(moved, piece) for piece in pieces)
