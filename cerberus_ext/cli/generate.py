"""`cerberus generate`: an answer, streamed, and how fast it came; or those to all prompts of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .drafts import show_drafts
from .failures import fail
from .many import File, Output, Raw, Slots, answer_file
from .on_ray import Ray, Replicas
from .shared import Device, DTypeName, HeadsOrNone, Model, Quantize, Threads, load_any, uncollected

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..drafting.heads import CerberusHeads
    from ..evaluation.ways import Way

ROUNDS = 3  # of --compare


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The question. Read from standard input if left out.")] = None,
    model: Model = None,
    heads: HeadsOrNone = None,
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
    compare: Annotated[
        bool,
        typer.Option(help="Measure plain decoding and transformers' model.generate, too, and print the speed-ups."),
    ] = False,
    show: Annotated[
        bool,
        typer.Option("--show-drafts", help="Colour each token by who has drafted it: nobody, the heads, the text."),
    ] = False,
    raw: Raw = False,
    file: File = None,
    output: Output = None,
    ray: Ray = None,
    replicas: Replicas = 1,
    slots: Slots = 8,
    quantize: Quantize = None,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answers PROMPT, streaming, then says how fast it was.

    With --compare it ends with status 1 where texts differ that must not.
    """
    options: dict[str, Any] = {"tree": tree_size, "proposers": None if suffix else []}
    loading = (model, heads, dtype, device, threads)
    if file is not None:
        if prompt or compare or show or quantize:
            fail("--file: cannot be had with PROMPT, --compare, --show-drafts or --quantize")
        options |= {"max_new_tokens": max_new_tokens, "raw": raw}
        return answer_file(file, output, ray, replicas, slots, loading, **options)
    text = _read_prompt(prompt)
    with uncollected():
        from transformers import TextStreamer

        from .. import Decoder, decode
        from ..io.prompts import encode_chat

        target, tokenizer, trained = load_any(*loading, quantize)
    ids = (tokenizer(text, return_tensors="pt").input_ids if raw else encode_chat(tokenizer, [text])).to(target.device)
    if show:
        stats = show_drafts(Decoder(target, trained, **options), tokenizer, ids, max_new_tokens)
    else:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stats = decode(target, trained, ids, streamer=streamer, max_new_tokens=max_new_tokens, **options).stats
    speed, line, right = stats.tokens_per_second, "", True
    if compare and stats.new_tokens:
        speed, line, right = compared(ways(target, trained, options), ids, stats.new_tokens, target.dtype)
    typer.echo(f"[{stats.new_tokens} tokens, {speed:.1f} tokens/s, {stats.tokens_per_step:.2f} tokens per step]{line}")
    if not right:
        raise typer.Exit(1)


def ways(target: PreTrainedModel, heads: CerberusHeads | None, options: dict[str, Any]) -> list[Way]:
    """Ours, with drafts as `options` say, and what it is compared with."""
    from ..drafting.gate import AlwaysClosed
    from ..evaluation.ways import DecodeWay, GenerateWay

    plain = {**options, "tree": None, "gate": AlwaysClosed()}  # the same loop, which never drafts
    return [
        DecodeWay("drafts", target, heads, options=options),
        DecodeWay("plain decoding", target, heads, options=plain),
        # As long a text as ours, also where rounding leads it to an earlier end.
        GenerateWay("model.generate", target, options={"eos_token_id": None}),
    ]


def compared(ways: Sequence[Way], ids: Tensor, new_tokens: int, dtype: torch.dtype) -> tuple[float, str, bool]:
    """Tokens/s of the first way; a line that compares it with the others; whether no text differs that must not.

    They take turns; medians count. All texts must be the same in float32, those of `decode` also in bfloat16 and
    float16 where it is exact: the kernels of `generate` round otherwise.
    """
    from ..evaluation.timing import rotated, timed

    rounds: list[dict[str, Any]] = [  # name -> ((text, statistics), seconds)
        {way.name: timed(partial(way.run, ids, new_tokens), ids.device) for way in rotated(ways, turn)}
        for turn in range(ROUNDS)
    ]
    speeds = {way.name: median(len(done[way.name][0][0]) / done[way.name][1] for done in rounds) for way in ways}
    parts, right, kind, (ours, *others) = [], True, str(dtype).removeprefix("torch."), speeds
    for name in others:
        pairs = [(done[ours][0][0], done[name][0][0]) for done in rounds]
        places = [place for pair in pairs for place, (a, b) in enumerate(zip_longest(*pair), start=1) if a != b]
        stats, verdict = rounds[0][name][0][1], "same output"
        if places and (kind == "float32" or (stats is not None and stats.exact)):
            verdict, right = f"OUTPUT DIFFERS from token {min(places)} on", False
        elif places:
            verdict = f"another output from token {min(places)} on, as its kernels round {kind} otherwise"
        parts.append(f"{speeds[ours] / speeds[name]:.2f}x {name}: {speeds[name]:.1f} tokens/s, {verdict}")
    return speeds[ours], f"\n[{'; '.join(parts)}]", right


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
