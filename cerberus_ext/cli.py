"""The `cerberus` command: generate, train, info."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from typing import NoReturn

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .compare import Comparison
    from .heads import CerberusHeads
    from .stats import DecodeOutput

app = typer.Typer(
    name="cerberus",
    help="Lossless faster generation for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

PACKAGED_HEADS = "smollm2-135m-instruct"

Model = Annotated[
    str | None, typer.Option(help="Local folder or Hub id of the base model. Default: SmolLM2-135M-Instruct.")
]
DTypeName = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 where it is fast.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA where there is one.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The question. Read from standard input if left out.")] = None,
    model: Model = None,
    heads: Annotated[
        str | None, typer.Option(help="Packaged name, local folder or Hub id. Default: those of the default model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    tree_size: Annotated[
        int | None, typer.Option(min=2, help="Nodes of the draft tree, root included. Default: see `cerberus info`.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Measure plain decoding, too, and print the speed-up.")] = False,
    raw: Annotated[bool, typer.Option(help="Give the prompt as it is, without the chat template.")] = False,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
) -> None:
    """Answers PROMPT, streaming, then says how fast it was."""
    text = _read_prompt(prompt)
    if model is not None and heads is None:
        _fail("--heads: the packaged heads fit the default model only; name heads trained for this --model")
    import torch
    from transformers import TextStreamer

    import cerberus_ext

    from .tree import default_tree

    if threads is not None:
        torch.set_num_threads(threads)
    _quiet_transformers()
    base, tokenizer = _load(model, _dtype(dtype), device)
    trained = _load_heads(heads or PACKAGED_HEADS, base)
    ids = _encode(tokenizer, text, raw).to(base.device)
    tree = None
    if tree_size is not None:
        tree = default_tree(trained, base.device, tree_size)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "tree": tree}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = cerberus_ext.decode(base, trained, ids, streamer=streamer, **options)
    comparison = None
    if compare:
        from .compare import compare_with_plain

        comparison = compare_with_plain(base, trained, ids, **options)
    typer.echo(summary(output, comparison))


@app.command()
def train(
    data: Annotated[Path, typer.Option(help='JSONL of token ids: {"p": prompt, "r": answer written by the model}.')],
    output: Annotated[Path, typer.Option(help="Folder for the heads and training.json; a killed run goes on from it.")],
    model: Model = None,
    heads: Annotated[int, typer.Option(min=1, help="K: tokens guessed after the root.")] = 4,
    layers: Annotated[int, typer.Option(min=1, help="L: layers of every head.")] = 2,
    anchor: Annotated[str, typer.Option(help="What starts the chain: root or hidden.")] = "root",
    chained: Annotated[bool, typer.Option(help="--no-chained gives Medusa's heads.")] = True,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Most frequent tokens that heads can guess; 0: all.")] = 8192,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch: Annotated[int, typer.Option(min=1, help="Positions a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations and checkpoints.")] = 250,
    cache: Annotated[Path | None, typer.Option(help="Folder for hidden states. Default: OUTPUT/hidden.")] = None,
    seed: int = 0,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
) -> None:
    """Trains heads for a model on its own answers."""
    import torch

    from . import train as training
    from .default_model import HUB_ID

    if threads is not None:
        torch.set_num_threads(threads)
    _quiet_transformers()
    base, _ = _load(model, torch.float32, device)
    try:
        options = training.TrainOptions(
            data=data, output=output, cache=cache, base_model=model or HUB_ID, heads=heads, layers=layers,
            anchor=anchor, chained=chained, draft_vocab=draft_vocab, steps=steps, batch=batch, lr=lr,
            eval_every=eval_every, seed=seed,
        )  # fmt: skip
        training.train(base, options)
    except (OSError, ValueError, FloatingPointError) as error:
        _fail(str(error))


@app.command()
def info() -> None:
    """Versions, libraries loaded, CPU features, CUDA."""
    from .info import print_info

    print_info()


def summary(output: DecodeOutput, comparison: Comparison | None) -> str:
    """One line: tokens/s, tokens a step and, where it was measured, the speed-up over plain decoding."""
    stats = output.stats
    speed = stats.tokens_per_second if comparison is None else comparison.tokens_per_second
    line = f"[{stats.new_tokens} tokens, {speed:.1f} tokens/s, {stats.tokens_per_step:.2f} tokens a step"
    if comparison is not None:
        same = "same output" if comparison.same_output else "OUTPUT DIFFERS"
        line += (
            f"; plain decoding {comparison.plain_tokens_per_second:.1f} tokens/s: "
            f"speed-up {comparison.speed_up:.2f}x, {same}"
        )
    return line + "]"


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            _fail('no prompt: write cerberus generate "your question", or pipe it in')
        prompt = sys.stdin.read()
    if not prompt.strip():
        _fail("the prompt is empty")
    return prompt


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        _fail(f"--dtype must be one of {', '.join(known)}, got {name}")
    return known[name] if name else None


def _load(
    model: str | None, dtype: torch.dtype | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .default_model import load_default_model, load_model

    try:
        return load_default_model(dtype, device) if model is None else load_model(model, dtype, device)
    except (OSError, RuntimeError) as error:
        _fail(f"--model: {error}")


def _load_heads(name: str, base: PreTrainedModel) -> CerberusHeads:
    from .default_model import HUB_ID
    from .heads import CerberusHeads

    try:
        heads = CerberusHeads.from_pretrained(name)
        if name == PACKAGED_HEADS and base.name_or_path == HUB_ID:
            # Trained on the Q4_1 weights of the same model. They fit the original nearly as well, and what is generated
            # never depends on them.
            heads.config.lm_head_fingerprint = None
        heads.bind(base)
        return heads
    except (OSError, ValueError) as error:
        _fail(f"--heads: {error}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool) -> torch.Tensor:
    """Token ids of the prompt, (1, S), with the chat template where the tokenizer has one."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(text, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded.input_ids


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _fail(message: str) -> NoReturn:
    typer.echo(f"cerberus: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the `cerberus` command."""
    app()


if __name__ == "__main__":
    main()
