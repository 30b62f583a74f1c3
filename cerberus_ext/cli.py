"""The `cerberus` command."""

from __future__ import annotations

import warnings

import typer

from .commands.bench import bench
from .commands.calibrate import calibrate
from .commands.failures import Commands
from .commands.generate import generate
from .commands.info import info
from .commands.train import train

app = typer.Typer(
    name="cerberus",
    cls=Commands,
    help="Lossless faster generation for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, train, calibrate, bench, info):
    app.command()(command)


def main() -> None:
    """Entry point of the `cerberus` command."""
    warnings.formatwarning = lambda message, *_: f"cerberus: {message}\n"
    app()


if __name__ == "__main__":
    main()
