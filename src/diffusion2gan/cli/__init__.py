"""The command line: one command per job. A command parses, then calls one function; heavy imports wait for the job."""

from __future__ import annotations

import errno
import os
import signal
import sys

import typer

from diffusion2gan.cli.compare import compare, serve, votes
from diffusion2gan.cli.demo import demo
from diffusion2gan.cli.distill import distill, plan
from diffusion2gan.cli.evaluate import evaluate
from diffusion2gan.cli.export import export, generate
from diffusion2gan.cli.pairs import pairs_app
from diffusion2gan.cli.perceptual import perceptual_app
from diffusion2gan.cli.pocket import pocket_app
from diffusion2gan.errors import Diffusion2GANError

app = typer.Typer(
    help="Distil a diffusers text-to-image pipeline into a one-step generator: pairs → distill → export → evaluate → "
    "compare. Every long job continues when the same command is run again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(pairs_app, name="pairs")
app.add_typer(perceptual_app, name="perceptual")
app.add_typer(pocket_app, name="pocket")
for command in (distill, plan, export, generate, evaluate, compare, serve, votes, demo):
    app.command()(command)

UNWRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
CONTINUE = "run the same command to continue"


def main() -> None:
    """The console script: exit code 0 for done, 2 for the user's mistakes, 1 for failures, 130 for an interruption."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except Diffusion2GANError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        again = (
            "choose another place (--out), or make this one writable"
            if error.errno in UNWRITABLE
            else CONTINUE
        )
        print(f"error: {error}. Nothing finished is lost; {again}.", file=sys.stderr)
        sys.exit(1)


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt
