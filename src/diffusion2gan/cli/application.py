"""The application: all commands in one typer app, and the console script `main`."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import diffusion2gan
from diffusion2gan.cli.compare import compare, serve, votes
from diffusion2gan.cli.demo import demo
from diffusion2gan.cli.distill import distill
from diffusion2gan.cli.evaluate import evaluate
from diffusion2gan.cli.export import export, generate
from diffusion2gan.cli.pairs import pairs_app
from diffusion2gan.cli.perceptual import perceptual_app
from diffusion2gan.cli.plan import plan
from diffusion2gan.cli.pocket import pocket_app
from diffusion2gan.cli.recipe import recipe_app
from diffusion2gan.cli.startup import INTERRUPTED
from diffusion2gan.errors import Diffusion2GANError, UserError

# Commands that continue when they are run again
CONTINUING = ("pairs", "distill", "evaluate", "compare", "demo", "perceptual", "pocket")


class Application(TyperGroup):
    """The group of all commands. After Ctrl-C it prints what is saved and how to continue."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            message = str(interrupt)  # some jobs give their own
            if not message and ctx.invoked_subcommand in CONTINUING:
                message = (
                    "stopped. What was finished is saved; to continue, run the same command again."
                )
            if message and os.environ.get("RANK", "0") == "0":
                print(message, file=sys.stderr)
            raise


# Commands inherit `-h` from the app's context settings.
app = typer.Typer(
    cls=Application,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# In the order of a distillation. The help text lists the commands first, then the groups.
app.add_typer(pairs_app, name="pairs")
app.add_typer(recipe_app, name="recipe")
app.command()(plan)
app.command()(distill)
app.command()(export)
app.command()(generate)
app.command()(evaluate)
app.command()(compare)
app.command()(serve)
app.command()(votes)
app.command()(demo)
app.add_typer(perceptual_app, name="perceptual")
app.add_typer(pocket_app, name="pocket")

# The output folder cannot be written, as opposed to a full disk or an I/O error.
NOT_WRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"diffusion2gan {diffusion2gan.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Distil a diffusers text-to-image pipeline into a one-step generator.

    The steps are pairs, distill, export, evaluate and compare. Any long command that was
    interrupted continues when the same command is run again.
    """


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done, 2 a mistake of the user, 1 a failure, 130 interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)

    try:
        _check_arguments(sys.argv[1:])
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Diffusion2GANError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            remedy = "choose another --out, or make this one writable"
        else:
            remedy = "run the same command again to continue"
        print(f"error: {error}. Finished work is kept; {remedy}.", file=sys.stderr)
        sys.exit(1)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Ctrl-C and SIGTERM end a command by KeyboardInterrupt, while it imports libraries at once.

    Some libraries, such as numpy, do not survive an exception while they are imported: they raise
    errors of their own, or abort the process. Nothing is being written at that time.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError if an argument is not UTF-8: safetensors and JSON take no other paths."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(
                f"the argument {shown} is not valid UTF-8. Rename the file or folder, or reach it "
                "by a link whose name is."
            ) from None
