"""The commands: one thin function each. Everything heavy is imported inside the functions, so that help and errors are quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from kdx import threads
from kdx.cli import interruption
from kdx.cli.demo import demo
from kdx.cli.distill import distill
from kdx.cli.doctor import doctor
from kdx.cli.evaluate import evaluate
from kdx.cli.explain import explain
from kdx.cli.export import export
from kdx.cli.layers import layers
from kdx.cli.panels import Command
from kdx.cli.plan import plan
from kdx.cli.report import report
from kdx.cli.similarity import similarity
from kdx.cli.study import study
from kdx.errors import KdxError, about_file


class _Commands(typer.core.TyperGroup):
    """Handles Ctrl-C and SIGTERM before typer does, which would exit without a message."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        with interruption.ended_with_one_line():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        with interruption.ended_with_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Shows what a student network learned from its teacher, and measures it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        import kdx

        typer.echo(f"kdx {kdx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None: ...


for _command in (demo, distill, export, explain, plan, study, similarity, evaluate, report, layers, doctor):
    app.command(cls=Command)(_command)


def _print_error(line: str, style: str | None = None) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, emoji=False).print(line, style=style, markup=False, soft_wrap=True)


def _end(error: KdxError) -> NoReturn:
    _print_error(f"Error: {error.problem}", style="bold red")
    _print_error(error.hint)
    sys.exit(2)


def run() -> None:
    """Run the command that the arguments name. For a KdxError it prints two sentences and exits with 2. Any other exception is a bug,
    except the system's OSError about a file, for example if a disk has vanished."""
    threads.set_environment(os.environ, threads.quota())  # before a command loads PyTorch
    try:
        app()
    except KdxError as error:
        _end(error)
    except OSError as error:
        if error.filename is None:  # not about a file
            raise
        _end(about_file(error))
