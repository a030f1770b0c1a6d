"""The ``gad`` command: what a user needs around training. ``gad --help`` lists the subcommands.

Every subcommand has its module under recipe/gad/commands/. It imports heavy libraries (torch, datasets, transformers)
only when it runs, so that ``gad --help`` stays fast. Bad input is a ValueError or an OSError: the command prints
``error: ...`` and exits with code 2.

Options are spelled in snake_case, as in the launch scripts: ``--output`` names a file to write, ``--output_dir`` a
folder. Hyphens are accepted too: ``--output-dir``.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from recipe.gad.commands import eval as eval_command
from recipe.gad.commands.collect import collect
from recipe.gad.commands.doctor import doctor
from recipe.gad.commands.export import export
from recipe.gad.commands.prepare import prepare
from recipe.gad.commands.referee import referee
from recipe.gad.commands.report import report
from recipe.gad.commands.watch import watch
from recipe.gad.run.findings import InputError, visible

__all__ = ["app", "main"]

app = typer.Typer(
    name="gad",
    help="Generative Adversarial Distillation: data, checks, evaluation, reports and export around the training runs.",
    epilog="Exit codes: 0 all is well; 1 the command found something, such as a failed request or an error of a run; "
    "2 an argument or a file is wrong; 130 Ctrl-C, which is 0 for gad watch; 143 SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),  # every subcommand inherits it
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"verl-gad {version('verl-gad')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep the name of a subcommand part of the command line, even if there is only one."""


# in the order of their use
app.command()(collect)
app.command()(prepare)
app.command()(doctor)
app.command()(watch)
app.command()(report)
app.add_typer(eval_command.app, name="eval")
app.command()(referee)
app.command()(export)


def main(argv: list[str] | None = None) -> None:
    """Run ``gad``; ``argv`` defaults to the arguments of the process. Always raises SystemExit."""
    words = sys.argv[1:] if argv is None else argv
    for name, value in zip(words, words[1:], strict=False):
        if name.replace("-", "_") in ("__output", "__output_dir") and not value:
            # an empty path would be the current folder
            _fail(str(InputError(f"{name} is empty", fix="name a file or folder")))
    try:
        with _cleaning_up():
            app(args=argv)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        _fail(str(error))


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Let SIGTERM end the command as an exception does, so that it removes its temporary files."""
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL or threading.current_thread() != threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail(message: str) -> NoReturn:
    print(f"error: {visible(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
