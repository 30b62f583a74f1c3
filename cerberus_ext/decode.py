"""Decoding with drafts: design.md, "One decoding step", in code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .gate import AlwaysOpen, Gate, answers
from .stats import DecodeOutput, DecodeStats
from .stepper import HeadsLike, Sampling, Stepper
from .text import GeneratedText
from .tree import DraftTree, default_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode(
    model: PreTrainedModel,
    heads: HeadsLike,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    tree: DraftTree | None = None,
    gate: Gate | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | list[int] | None = None,
    stopping_criteria: list[Any] | None = None,
    streamer: Any = None,
    graphs: bool | None = None,
    compile: bool = False,
) -> DecodeOutput:
    """Generates what `model` alone would, in fewer forwards.

    model: a decoder-only transformers model with a key/value cache (full or sliding attention), in evaluation mode, on
        one device. It is left as it was, also when this raises.
    heads: CerberusHeads, or anything else that guesses. They never change the text.
    ids: (1, S) int64 on the model's device: the prompt. attention_mask: None or all ones.
    max_new_tokens: at most so many tokens are generated, >= 0.
    tree: which guesses a step checks. None: the one that `calibrate` found for these heads on this device, with this
        dtype and, on a CPU, torch.get_num_threads(); where there is none, `default_tree(heads, device)`.
    gate: when, and with which tree. None: the calibrated one where the tree is, too; otherwise at every step.
    temperature: 0 takes the most likely token, as `model.generate(do_sample=False)` does without logits processors.
        Above 0, tokens are drawn, with noise determined by seed and position, so that for a seed the text is the same
        whatever the heads, the tree and the gate; top_k and top_p are those of `ops.choose_tokens`.
    eos_token_id: token or tokens that end the text, included in it; None: those of model.generation_config.
    stopping_criteria, streamer: transformers' own, see `generate`.
    graphs: steps as CUDA graphs, see graphs.py. None: where possible; True: or an error; False: not.
    compile: on a CPU, the base model's steps go through torch.compile, see compiled_step.py. The first decode of a
        process waits until they are compiled.

    Returns sequences (1, S + new) and stats. Raises TypeError or ValueError, naming the argument, where one is wrong,
    and RuntimeError while the same model is already decoding.
    Source: arXiv 2410.13344.
    """
    # Here, and not above: they import transformers, which takes seconds and is not needed to look at a tree.
    from . import checks
    from .calibration.store import find
    from .compiled_step import compiled_steps
    from .graphs import open_stepper

    checks.check_model(model)
    checks.check_heads(heads)
    checks.check_ids(ids, model)
    checks.check_attention_mask(attention_mask, ids)
    checks.check_integer("max_new_tokens", max_new_tokens, 0)
    checks.check_sampling(temperature, top_k, top_p, seed)
    checks.check_streamer(streamer)
    checks.check_graphs(graphs)
    checks.check_compile(compile, graphs)
    sampling = Sampling(seed, float(temperature), top_k, float(top_p)) if temperature else Sampling()
    if tree is None:
        calibrated = find(heads, model.device, model.dtype, torch.get_num_threads())
        tree = calibrated.tree if calibrated else default_tree(heads, ids.device)
        gate = calibrated.gate if calibrated and gate is None else gate
    tree = checks.check_tree(tree, heads.config.num_heads)
    gate = AlwaysOpen() if gate is None else checks.check_gate(gate)
    trees = [checks.check_tree(one, heads.config.num_heads) for one in gate.trees(tree)]
    stopping = checks.stopping_criteria_list(stopping_criteria)
    text = GeneratedText(ids, max_new_tokens, checks.eos_token_ids(eos_token_id, model), stopping, streamer)
    stats = DecodeStats()
    compiled = compiled_steps(model, {one.size for one in trees}, stats) if compile else None
    if not text.ended:
        capacity = ids.shape[1] + max_new_tokens + max(one.size for one in trees)
        guesses = max(one.guesses for one in trees)
        ahead = answers(gate, "choose")
        with (
            torch.inference_mode(),
            open_stepper(
                model, heads, capacity, ids.shape[0], guesses, ahead, sampling, stats, graphs, compiled
            ) as stepper,
        ):
            with stats.phase("prefill"):
                text.add(stepper.prefill(ids))
            while not text.ended:
                # A step gains one token more than it accepts guesses.
                deepest = min(text.remaining - 1, stepper.deepest())
                tokens = take_step(stepper, gate, tree, deepest if guesses else 0)
                with stats.phase("commit"):
                    text.add(tokens)
    stats.new_tokens = len(text.tokens)
    return DecodeOutput(text.finish(), stats)


def take_step(stepper: Stepper, gate: Gate, tree: DraftTree, deepest: int) -> list[int]:
    """Asks the gate, and runs a step with what it answers, cut to depth `deepest` -> the tokens gained.

    deepest: 0 where a guess is of no use; the gate is then not asked.
    """
    with stepper.stats.phase("draft"):
        chosen = ask(gate, tree, stepper) if deepest > 0 else None
    return stepper.step(chosen or DraftTree.root(), deepest)


class Signals(Protocol):
    """What a gate may want to see of a step; a Stepper is one."""

    @property
    def hidden(self) -> Tensor: ...

    def entropy(self) -> float: ...

    def logprobs(self) -> Tensor: ...


def ask(gate: Gate, tree: DraftTree, step: Signals) -> DraftTree | None:
    """The tree that the gate wants to be checked at this step, or None. It is asked no more than it answers."""
    if answers(gate, "opens"):
        is_open = gate.opens(step.hidden)
    else:
        is_open = not answers(gate, "opens_at") or gate.opens_at(step.entropy())
    if is_open and answers(gate, "choose"):
        return gate.choose(tree, step.logprobs())
    return tree if is_open else None
