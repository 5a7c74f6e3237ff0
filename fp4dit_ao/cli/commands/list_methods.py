"""Options of ``fp4dit-ao methods``."""

from typing import Annotated

import typer


def methods(
    point: Annotated[
        str | None, typer.Argument(help="Plug-in point, such as rounding; all of them if not given.")
    ] = None,
) -> None:
    """List the methods that are registered at every plug-in point, with source and cost."""
    from fp4dit_ao import plugin_points as run

    typer.echo(run.methods_table(run.methods(point)))
