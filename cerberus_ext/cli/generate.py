"""`cerberus generate`: an answer, streamed, and how fast it came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import fail
from .shared import NO_HEADS, Device, DTypeName, Model, Threads, load, load_target

if TYPE_CHECKING:
    from ..drafting.heads import CerberusHeads
    from ..runtime.stats import DecodeOutput

ROUNDS = 3  # of --compare


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
    raw: Annotated[bool, typer.Option(help="Give the prompt as it is, without the chat template.")] = False,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answers PROMPT, streaming, then says how fast it was."""
    text = _read_prompt(prompt)
    from transformers import TextStreamer

    from ..drafting.gate import AlwaysClosed
    from ..engine.decode import decode
    from ..io.prompts import encode_chat

    trained: CerberusHeads | None = None
    if heads == NO_HEADS:
        target, tokenizer = load_target(model, dtype, device, threads)
    else:
        target, tokenizer, trained = load(model, heads, dtype, device, threads)
    ids = (tokenizer(text, return_tensors="pt").input_ids if raw else encode_chat(tokenizer, [text])).to(target.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "tree": tree_size}
    options["proposers"] = None if suffix else []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = decode(target, trained, ids, streamer=streamer, **options)
    plain = {**options, "tree": None, "gate": AlwaysClosed()}  # the same loop, which never drafts; in turns with ours
    rounds = [
        [decode(target, trained, ids, **each) for each in (plain, options)] for _ in range(ROUNDS if compare else 0)
    ]
    typer.echo(summary(output, rounds))


def summary(output: DecodeOutput, rounds: Sequence[Sequence[DecodeOutput]]) -> str:
    """One line: tokens/s, tokens per step and, where it was measured, the speed-up over plain decoding.

    rounds: plain decoding and ours; medians count.
    """
    stats = output.stats
    speeds = [median(out.stats.tokens_per_second for out in outs) for outs in zip(*rounds, strict=True)]
    speed = speeds[1] if speeds else stats.tokens_per_second
    line = f"[{stats.new_tokens} tokens, {speed:.1f} tokens/s, {stats.tokens_per_step:.2f} tokens per step"
    if speeds:
        same = all(plain.sequences.equal(ours.sequences) for plain, ours in rounds)
        line += f"; plain decoding {speeds[0]:.1f} tokens/s: speed-up {speed / speeds[0]:.2f}x"
        line += f", {'same output' if same else 'OUTPUT DIFFERS'}"
    return line + "]"


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            fail('no prompt: write cerberus generate "your question", or pipe it in')
        try:
            prompt = sys.stdin.buffer.read().decode()  # UTF-8, whatever the locale says
        except UnicodeDecodeError as error:
            byte = f"{error.object[error.start]:#04x} at {error.start}"
            fail(f"standard input: must be UTF-8 text, got byte {byte}", cause=error)
    try:
        prompt.encode()
    except UnicodeEncodeError:  # an argument of other bytes
        fail("PROMPT: must be UTF-8 text")
    if "\0" in prompt:
        fail("PROMPT: must be text, got a byte of zero")
    if not prompt.strip():
        fail("the prompt is empty")
    return prompt
