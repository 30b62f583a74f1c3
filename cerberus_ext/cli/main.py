"""The `cerberus` command."""

from __future__ import annotations

import warnings

import typer

from .bench import bench
from .calibrate import calibrate
from .chat import chat
from .failures import Commands
from .generate import generate
from .info import info
from .serve import serve
from .train import train

app = typer.Typer(
    name="cerberus",
    cls=Commands,
    help="Lossless faster generation for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, chat, serve, train, calibrate, bench, info):
    app.command()(command)


def main() -> None:
    """Entry point of the `cerberus` command."""
    warnings.formatwarning = lambda message, *_: f"cerberus: {message}\n"
    app()
