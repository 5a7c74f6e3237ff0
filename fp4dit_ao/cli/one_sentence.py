"""Failures of commands as one sentence on stderr: :class:`OneSentence`."""

import logging
import os
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from fp4dit_ao.util.sentences import first_line

EXPECTED = (ValueError, OSError, RuntimeError)
"""Exceptions of wrong input and of the machine's limits; any other is a bug and shows its traceback."""


class OneSentence(TyperGroup):
    """Group of commands that end an expected failure with one sentence on stderr and exit status 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes ``--debug`` out of the arguments, wherever it stands."""
        ctx.obj = {"debug": "--debug" in args}
        rest: list[str] = super().parse_args(ctx, [arg for arg in args if arg != "--debug"])
        return rest

    def invoke(self, ctx: Any) -> object:
        """Runs the command; see the class."""
        debug = ctx.obj["debug"]
        if not debug:
            quiet_libraries()
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # these are RuntimeErrors, but not failures
            raise
        except EXPECTED as error:
            if debug:
                raise
            typer.echo(f"fp4dit-ao: {with_notes(first_line(error), error)}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo(f"fp4dit-ao: {with_notes('interrupted', error)}", err=True)
            raise typer.Exit(130) from None


def with_notes(sentence: str, error: BaseException) -> str:
    """``sentence`` and the notes that were added to ``error``."""
    return "; ".join([sentence, *getattr(error, "__notes__", ())])


def quiet_libraries() -> None:
    """Silences logs and warnings of libraries; warnings of this package become one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torch", "torchao", "torch.utils._pytree", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"fp4dit_ao(\.|$)")
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"fp4dit-ao: {message}", err=True)
