"""Every example of the documentation runs, as it stands there: a page is a script, executed block by block in an empty folder.

Names that stand for a user's own things are things of that name here: ``MODEL``, ``DIR`` and a hub id are folders with a small
pipeline. What is changed so that it ends in time, and what runs elsewhere, is in two tables below; a change that no longer
fits its page is an error, and so is a command that nobody runs.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

import fp4dit_ao
from docs.tools import architecture_figure
from fp4dit_ao.cli.app import app
from tests.conftest import ROOT
from tests.diffusers_integration.test_diffusers import Hub
from tests.tiny import CALL, tiny_pipeline

HUB_ID = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"

CHANGES = {
    "README.md": {
        "AdaRoundConfig(iters=2500)": ("AdaRoundConfig(iters=2)", "half an hour"),
        "prompts=prompts, steps=20)": ("prompts=prompts, steps=20, samples=2)", "minutes"),
        '"a tiger").images': ('"a tiger", use_resolution_binning=False).images', "diffusers bins no images of 32 pixels"),
        "--out DIR": ("--out DIR --samples 2", "minutes"),
    },
    "docs/methods.md": {
        "samples=128": ("samples=2", "a minute"),
        "iters=400)": ("iters=2, batch_size=2)", "minutes"),
        "samples=32": ("samples=2", "a minute"),
        "--scope layer": ("--scope layer --samples 2", "a minute"),
    },
    "docs/extending.md": {
        '"steps": 20}': ('"steps": 20, "samples": 2}', "minutes"),
        "iters=2500": ("iters=2", "half an hour"),
    },
    "docs/serving.md": {
        "4096": ("128", "the small pipeline's text encoder is narrow"),
        "fp4dit-ao serve DIR": ("fp4dit-ao serve DIR --port PORT", "8000 may be taken"),
        "localhost:8000": ("localhost:PORT", "8000 may be taken"),
    },
    "fp4dit_ao/reference/README.md": {
        "--prompts 200": ("--prompts 2", "a minute"),
        "--steps 20": ("--steps 2", "a minute"),
    },
}  # fmt: skip
"""By page: what its text says in one place, what is executed instead, and what that saves, or why it must be."""

ELSEWHERE = {
    "pip install -c constraints.txt . && fp4dit-ao demo": ".ci/run, in an environment of its own",
    "pip install -c constraints.txt '.[dev]' && pytest": ".ci/run, in an environment of its own",
    "pip install -c constraints.txt '.[peers]'": "nothing here needs other packages; those missing are listed as such",
    "pip install 'fp4dit-ao[serve]'": "a part of dev, so installed by .ci/run",
    "pip install 'fp4dit-ao[ray]'": "a part of dev, so installed by .ci/run",
    "fp4dit-ao export DIR package.pt2 --aoti": "a minute; tests/deploy/test_export.py runs what it writes",
    "serve run fp4dit_ao.serving.ray:build model=DIR replicas=4 gpus=1": "needs GPUs; tests/serving/test_ray.py runs two",
    "python -m benchmarks.gpu --part linears --only FLUX --out benchmarks/results/gpu-h200-linears.json": "needs a GPU; "
    "tests/benchmark/test_gpu_benchmark.py runs its parts",
    "torchrun --nproc-per-node 8 --max-restarts 3 -m fp4dit_ao.cli quantize MODEL --prompts prompts.txt --out DIR --resume": ""
    "needs 8 devices; tests/cli/test_torchrun.py runs two processes",
    "fp4dit-ao sweep table.json --out results --gpus 1 --address auto": "a cluster; tests/cli/test_sweep.py has two workers",
    "python benchmarks/quality.py": "hours; tests/evaluation/test_evaluate.py tests its parts",
    "python benchmarks/paper_table.py deepcompressor --prompts meta_data.json --real mjhq30k_imgs --work outputs/paper": (
        "a GPU, for days; tests/benchmark/test_paper_table.py runs all of it on small things"
    ),
    "fp4dit-ao benchmark --out benchmarks/results/cpu.json": "40 minutes; tests/cli and tests/benchmark run its parts",
    "npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz": "needs npm",
    "python -m fp4dit_ao.reference.train autoencoder --package package --work work": "hours, and what npm gets",
    "python -m fp4dit_ao.reference.train transformer --package package --work work --steps 4600": "likewise",
    "python -m fp4dit_ao.reference.train export --package package --work work": "likewise",
}
"""Commands of the pages that are not executed here, and why."""


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    """Of the page, on which the block's text begins."""
    text: str


def markdown() -> list[Path]:
    """Every page of the repository, but those that other tools read."""
    folders = ("docs", "fp4dit_ao", "passes", "observers", "benchmarks", "tutorials", "tests")
    return [*sorted(ROOT.glob("*.md")), *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.md")))]


def pages() -> list[str]:
    """Those with an example, from the root."""
    return [str(path.relative_to(ROOT)) for path in markdown() if examples(path.read_text(encoding="utf-8"))]


def examples(text: str) -> list[Block]:
    """The blocks of code in a page, but for those that say they are text."""
    found = [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
    ]
    assert text.count("```") == 2 * len(found), "a block that is not found is not executed"
    return [block for block in found if block.language != "text"]


def commands(block: Block) -> Iterator[str]:
    """Its lines without comments; a backslash joins two."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s+)#.*", "", line).strip()
        if command:
            yield re.sub(r"\s+", " ", command)


def changed(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    for old, (new, _) in CHANGES.get(page, {}).items():
        assert text.count(old) == 1, f"{page} says {old!r} {text.count(old)} times: CHANGES no longer fits"
        text = text.replace(old, new)
    return text


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages name, and a reader has."""
    folder = tmp_path_factory.mktemp("things")
    tiny_pipeline(layers=1).save_pretrained(folder / "MODEL")
    (folder / "MODEL" / "generation.json").write_text(json.dumps(CALL))
    shutil.copytree(folder / "MODEL", folder / HUB_ID)
    (folder / "prompts.txt").write_text("a red cat\na blue dog\n")
    tiny_quantized.save_pretrained(folder / "DIR")
    shutil.copytree(folder / "DIR", folder / "pixart-w4a6")
    return folder


class Shell:
    """Runs commands; those of this package in this process, and a server beside it until :meth:`close`."""

    def __init__(self, ended: ExitStack):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.ended = ended

    def run(self, command: str) -> None:
        match shlex.split(command.replace("PORT", self.port)):
            case ["fp4dit-ao", "serve", *arguments]:
                self.serve(arguments)
            case ["fp4dit-ao", *arguments]:
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, result.output
            case ["curl", *arguments]:
                self.ask(arguments)
            case ["python", *arguments]:
                subprocess.run([sys.executable, *arguments], check=True)
            case _:
                raise AssertionError("nothing runs this command; teach Shell, or say in ELSEWHERE who does")

    def serve(self, arguments: list[str]) -> None:
        command = [sys.executable, "-c", "from fp4dit_ao.cli.app import main; main()", "serve", *arguments]
        server = subprocess.Popen(command)
        self.ended.callback(self.end, server)
        ready, began = f"http://localhost:{self.port}/health/ready", time.monotonic()
        while True:
            assert server.poll() is None, "the server ended before it was ready"
            assert time.monotonic() - began < 300, "the server is not ready after 300 s"
            try:
                if httpx2.get(ready).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.5)

    def end(self, server: subprocess.Popen[bytes]) -> None:
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(60) == 0
        finally:
            server.kill()

    def ask(self, arguments: list[str]) -> None:
        """What curl would: it is not everywhere."""
        parser = argparse.ArgumentParser("curl")
        parser.add_argument("url")
        parser.add_argument("-H", dest="headers", action="append", type=lambda text: tuple(text.split(": ", 1)))
        parser.add_argument("-d", dest="data")
        asked = parser.parse_args(arguments)
        answer = httpx2.post(f"http://{asked.url}", content=asked.data, headers=asked.headers, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["b64_json"]


@pytest.mark.parametrize("page", pages())
def test_page(page: str, things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = changed(page)
    made = {"DIR", "pixart-w4a6"} if page == "README.md" else set()  # by the page itself
    shutil.copytree(
        things, tmp_path, dirs_exist_ok=True, ignore=lambda folder, names: made if folder == str(things) else ()
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Hub(monkeypatch)
    names: dict[str, Any] = {"__name__": "__main__"}
    with ExitStack() as ended:
        shell = Shell(ended)
        for block in examples(text):
            where = f"{page}, line {block.line}"
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
                continue
            assert block.language == "bash", f"{where}: a block in {block.language or 'no language'} cannot be executed"
            for command in commands(block):
                if command not in ELSEWHERE:
                    try:
                        shell.run(command)
                    except Exception as error:
                        raise AssertionError(f"{where}: {command}") from error


# --- links -----------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """Targets of links and pictures, but for the web's."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Headings as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in markdown()])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            missing.append(target)
    tops = "fp4dit_ao|passes|observers|tests|docs|benchmarks|tutorials"
    for path in re.findall(rf"`((?:{tops})/[\w./-]*)`", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)):
        if not (ROOT / path).exists():
            missing.append(path)
    assert not missing


def test_every_public_name_is_in_the_api_reference() -> None:
    listed = re.findall(r"^::: fp4dit_ao\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(fp4dit_ao.__all__)


def test_the_figure_of_the_architecture_is_the_checked_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its rooms are those of the contract in pyproject.toml."""
    monkeypatch.setattr(architecture_figure, "OUT", tmp_path / "architecture.svg")
    architecture_figure.main()
    shown, drawn = (
        re.findall(r">([^<>]+)</text>", path.read_text(encoding="utf-8"))
        for path in (ROOT / "docs" / "architecture.svg", tmp_path / "architecture.svg")
    )
    assert shown == drawn, "draw it again: python docs/tools/architecture_figure.py"


# --- what runs elsewhere, and what stands in a sentence --------------------------------------------------------------


def test_every_exception_is_one() -> None:
    assert set(CHANGES) <= set(pages())
    found = {
        command
        for page in pages()
        for block in examples((ROOT / page).read_text(encoding="utf-8"))
        if block.language == "bash"
        for command in commands(block)
    }
    assert set(ELSEWHERE) <= found


def spoken() -> set[str]:
    """Commands between backticks."""
    found = set()
    for path in markdown():
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found |= {" ".join(command.split()) for command in re.findall(r"`((?:fp4dit-ao|python) [^`]+)`", text)}
    return found


def ours(command: str) -> bool:
    return command.startswith(("fp4dit-ao ", "python ", "serve run ")) and "&&" not in command


@pytest.mark.parametrize("command", sorted({*spoken(), *filter(ours, ELSEWHERE)}))
def test_a_command_that_is_not_executed_is_understood(command: str) -> None:
    """It takes minutes or hours: its options exist, and take what they are given."""
    program, *arguments = shlex.split(command)
    if program == "serve":  # Ray's: a function of one model, which takes name=value
        _, target, *values = arguments
        module, _, name = target.partition(":")
        [taken] = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
        taken.annotation.model_validate(dict(value.split("=", 1) for value in values))
        return
    if program == "python":
        script = arguments.pop(0)
        module = importlib.import_module(
            arguments.pop(0) if script == "-m" else script.removesuffix(".py").replace("/", ".")
        )
        understood = _command(getattr(module, "app", None) or module.main)
    else:
        understood = _command(app)
    while isinstance(understood, TyperGroup):
        understood = understood.commands[arguments.pop(0)]
    if arguments:  # else a sentence that only names it
        understood.make_context(command, arguments)  # reads them, and runs nothing


def _command(what: Any) -> Any:
    if isinstance(what, typer.Typer):
        return typer.main.get_command(what)
    alone = typer.Typer()
    alone.command()(what)
    return typer.main.get_command(alone)


# --- docstrings ------------------------------------------------------------------------------------------------------


def shown_in_docstrings() -> Iterator[tuple[str, str]]:
    """Blocks of Python after ``::``, with the module that they are in."""
    folders = ("fp4dit_ao", "passes", "observers", "benchmarks")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node) or ""
                assert ">>>" not in doc, f"{path}: write examples after ::, which are executed here"
                for code in re.findall(r"::\n\n((?:(?: {4}.*)?\n)+)", doc + "\n"):
                    if re.search(r"^ {4}(from|import) ", code, re.MULTILINE):
                        yield str(path.relative_to(ROOT)), textwrap.dedent(code)


@pytest.mark.parametrize(("module", "code"), shown_in_docstrings())
def test_docstring(module: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, module, "exec"), {})
