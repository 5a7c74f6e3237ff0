"""The command ``fp4dit-ao``: its own options and its list of commands, one file each in :mod:`fp4dit_ao.cli.commands`.

``sweep`` stands here, since it runs others of them.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4dit_ao import __version__
from fp4dit_ao.cli.commands.benchmark import benchmark
from fp4dit_ao.cli.commands.demo import demo
from fp4dit_ao.cli.commands.evaluate import evaluate
from fp4dit_ao.cli.commands.export import export
from fp4dit_ao.cli.commands.generate import generate
from fp4dit_ao.cli.commands.inspect import inspect
from fp4dit_ao.cli.commands.list_methods import methods
from fp4dit_ao.cli.commands.quantize import quantize
from fp4dit_ao.cli.commands.serve import serve
from fp4dit_ao.cli.one_sentence import OneSentence
from fp4dit_ao.cli.output_paths import check_writable_folder

app = typer.Typer(
    cls=OneSentence, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="4-bit floating-point diffusion transformers. MODEL is a pipeline's folder, a hub id, or 'reference' for the "
    "small pipeline that ships. --debug, anywhere, shows the traceback of an error.",
)  # fmt: skip


USAGE_ERROR: Any = typer.BadParameter.__base__
"""Exception of wrong options: click's, or that of the copy that newer versions of typer bring along."""


def print_version(asked: bool) -> None:
    """Prints the versions of this package and of what it runs on, and exits, if ``asked``."""
    if asked:
        found = {name: metadata.version(name) for name in ("torch", "torchao", "diffusers")}
        typer.echo(f"fp4dit-ao {__version__} ({', '.join(f'{name} {text}' for name, text in found.items())})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def sweep(
    table: Annotated[
        Path,
        typer.Argument(
            help='JSON list of rows: {"name": …, "model": …} and options of quantize; those of evaluate under "evaluate".'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results, which every machine sees; finished rows are kept.")],
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of each row.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each row; rows with fractions share one.")] = 0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as 'auto'; a local one is started if not given.")
    ] = None,
) -> None:
    """Quantize, and evaluate, a list of models and recipes over a Ray cluster."""
    from fp4dit_ao.cli import sweep as run

    check_writable_folder(out)
    run.sweep(table, out, cpus=cpus, gpus=gpus, address=address, check=check_command, run=run_command)


def check_command(arguments: list[str]) -> None:
    """Raises ``ValueError`` if ``fp4dit-ao`` does not take these arguments."""
    commands: Any = typer.main.get_command(app)
    try:
        commands.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    except USAGE_ERROR as error:
        raise ValueError(error.format_message()) from error


def run_command(arguments: list[str]) -> int:
    """Runs ``fp4dit-ao`` in this process, and returns its exit status."""
    return int(app(args=arguments, standalone_mode=False) or 0)


for command in (demo, quantize, sweep, generate, evaluate, inspect, methods, benchmark, export, serve):
    app.command()(command)


def main() -> None:
    """Entry point of ``fp4dit-ao``."""
    sys.exit(app())
