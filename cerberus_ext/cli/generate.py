"""`cerberus generate`: an answer, streamed, and how fast it came."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import fail, option
from .shared import (
    NO_HEADS,
    PACKAGED_HEADS,
    Device,
    DTypeName,
    Model,
    Threads,
    begin,
    check_heads_named,
    dtype_of,
    encode,
    load_heads,
    load_target,
)

if TYPE_CHECKING:
    from ..evaluation.compare import Comparison
    from ..runtime.stats import DecodeOutput


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The question. Read from standard input if left out.")] = None,
    model: Model = None,
    heads: Annotated[
        str | None,
        typer.Option(help="As for the other commands; 'none': draft from the text alone, for any model."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    tree_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Nodes of a step's draft tree, root included, without a gate."
            " Default: what `cerberus calibrate` chose, else 6 to 32 nodes, by the device.",
        ),
    ] = None,
    suffix: Annotated[bool, typer.Option(help="Draft from the text's own past, too, not from the heads alone.")] = True,
    compare: Annotated[bool, typer.Option(help="Measure plain decoding, too, and print the speed-up.")] = False,
    compile: Annotated[
        bool,
        typer.Option(help="On a CPU: compile the target model's steps, which takes a while, less the second time."),
    ] = False,
    raw: Annotated[bool, typer.Option(help="Give the prompt as it is, without the chat template.")] = False,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answers PROMPT, streaming, then says how fast it was."""
    text = _read_prompt(prompt)
    check_heads_named(model, heads)
    from transformers import TextStreamer

    from ..drafting.dynamic_policy import DynamicPolicy
    from ..engine.decode import decode
    from ..runtime.compiled_step import CompileError

    begin(threads)
    base, tokenizer = load_target(model, dtype_of(dtype), device)
    trained = None if heads == NO_HEADS else load_heads(heads or PACKAGED_HEADS, base)
    ids = encode(tokenizer, text, raw).to(base.device)
    tree = None if tree_size is None else DynamicPolicy(tree_size)
    proposers: list[Any] | None = None if suffix else []
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "tree": tree, "proposers": proposers, "compile": compile
    }  # fmt: skip
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        output = decode(base, trained, ids, streamer=streamer, **options)
    except CompileError as error:
        fail(f"--compile: {error}", cause=error)
    comparison = None
    if compare:
        from ..evaluation.compare import compare_with_plain

        comparison = compare_with_plain(base, trained, ids, **options)
    typer.echo(summary(output, comparison))


def summary(output: DecodeOutput, comparison: Comparison | None) -> str:
    """One line: tokens/s, tokens a step and, where it was measured, the speed-up over plain decoding.

    What the first answer waited for a compiler is said, too; it is in none of the speeds.
    """
    stats = output.stats
    speed = stats.tokens_per_second if comparison is None else comparison.tokens_per_second
    line = f"[{stats.new_tokens} tokens, {speed:.1f} tokens/s, {stats.tokens_per_step:.2f} tokens a step"
    if comparison is not None:
        same = "same output" if comparison.same_output else "OUTPUT DIFFERS"
        line += (
            f"; plain decoding {comparison.plain_tokens_per_second:.1f} tokens/s: "
            f"speed-up {comparison.speed_up:.2f}x, {same}"
        )
    if stats.compilations:
        line += f"; compiled in {stats.compile_seconds:.1f} s"
    return line + "]"


def decoded(text: bytes) -> str:
    """UTF-8, whatever the locale says."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8 text, got byte {text[error.start]:#04x} at {error.start}") from None


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            fail('no prompt: write cerberus generate "your question", or pipe it in')
        with option("standard input"):
            prompt = decoded(sys.stdin.buffer.read())
    try:
        prompt.encode()
    except UnicodeEncodeError:  # an argument of other bytes
        fail("PROMPT: must be UTF-8 text")
    if "\0" in prompt:
        fail("PROMPT: must be text, got a byte of zero")
    if not prompt.strip():
        fail("the prompt is empty")
    return prompt
