"""Failures of the command line: one line `cerberus: --option: what and why` on stderr, and a status.

2: something that the user gave, or the machine, does not fit. 130: interrupted. 141: nobody reads standard output.
CERBERUS_DEBUG=1 shows Python's traceback as well.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..io.model_files import first_line

EXPECTED = (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError, ImportError)  # others are our own mistakes
# Names of functions, which tell a user nothing.
OURS = re.compile(r"(?:CerberusHeads\.\w+|load_default_model|quantize): ")
ARGUMENT = re.compile(r"(?:train|calibrate|bench|decode): (\w+)(: | must | of | needs )")


class Commands(TyperGroup):
    """The one place that turns failures of all commands into a line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # at exit nobody could say any more what is wrong
            return result
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:  # `| head`
            _close_stdout()
            raise typer.Exit(141) from None
        except Exception as error:
            if _is_answer(error):
                raise
            where = "standard output: " if _is_of_stdout(error) else ""
            fail(where + _with_option(sentence(error), self, ctx), cause=error)


@contextmanager
def option(name: str) -> Iterator[None]:
    """Failures inside it are those of this option."""
    try:
        yield
    except EXPECTED as error:
        if _is_answer(error) or isinstance(error, BrokenPipeError):
            raise
        fail(f"{name}: {sentence(error)}", cause=error)


def fail(message: str, status: int = 2, cause: BaseException | None = None) -> NoReturn:
    if cause is not None and os.environ.get("CERBERUS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(cause)
    typer.echo(f"cerberus: {message}", err=True)
    raise typer.Exit(status)


def sentence(error: BaseException) -> str:
    """What an error says, as one line."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    text = OURS.sub("", first_line(str(error)))
    if not isinstance(error, EXPECTED) or not text:
        kind = type(error).__name__
        return f"{kind}: {text} (CERBERUS_DEBUG=1 shows where)" if text else kind
    return text


def _is_answer(error: BaseException) -> bool:
    """Whether it is one of typer's own, which end the command as they should."""
    return isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code")


def _with_option(text: str, commands: TyperGroup, ctx: Any) -> str:
    """Messages of the package name the argument of a function: here that is an option."""
    match, command = ARGUMENT.match(text), commands.commands.get(ctx.invoked_subcommand or "")
    for parameter in command.params if match and command else ():
        if match and parameter.name == match[1] and parameter.opts[0].startswith("--"):
            return parameter.opts[0] + text[match.start(2) :]
    return text


def _close_stdout() -> None:
    """So that the interpreter does not try again at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_of_stdout(error: Exception) -> bool:
    """Files have a name in our errors. Closes standard output where it was that."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    of_stdout = isinstance(error, OSError) and error.filename is None and error.errno in full
    if of_stdout:
        _close_stdout()
    return of_stdout
