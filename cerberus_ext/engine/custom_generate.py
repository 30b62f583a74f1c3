"""`generate`: what transformers' `model.generate(custom_generate=...)` calls in the place of its own loop."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..drafting.drafter import HeadsLike
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.tree import TreePolicy
from ..runtime.logit_rules import REFUSED, check_refused
from .decoder import Decoder
from .text import ends_streamer

_ASSISTED = "drafts are those of heads and proposers"
_ONE_OUTPUT = "nothing but sequences is returned"
# Fields of the generation_config, as in REFUSED. transformers has made stopping criteria of two of those.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{field: row for field, row in REFUSED.items() if field not in ("max_time", "stop_strings")},
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), (bool, _ASSISTED)),
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), (bool, _ONE_OUTPUT)
    ),
}
_PREPARED = ("position_ids", "cache", "past_key_values")  # made by `generate` where the user gives none
_HARMLESS = ("logits_to_keep", "use_cache")
# `generate` has them in the opposite order.
_WARPERS: dict[str, Any] = {
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "temperature": TemperatureLogitsWarper,
}


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    /,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    heads: HeadsLike | None = None,
    tree: int | TreePolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
    seed: int | None = None,
    graphs: bool | None = None,
    fuse: bool | None = None,
    pack: bool | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(ids, custom_generate=cerberus_ext.generate, heads=heads, ...)`: the same text, in fewer forwards.

    heads, tree, gate, proposers, graphs, fuse, pack: as in `decode`. All other arguments are those of `model.generate`
    with a prompt of one row, ids (1, S); transformers prepares them and calls this. Its logits processors must look at
    nothing but their arguments: those of the same place may be called more than once.
    do_sample: tokens are drawn from the same probabilities as by `generate`, but with the noise of `decode`, by seed
        and position: other tokens than those of `generate`, and the same with and without drafts. seed None: one is
        drawn from torch's generator, so that torch.manual_seed determines the text here, too.
    streamer: gets what `generate` gives it; its `end` is called once, also where this raises.

    Returns sequences (1, S + new) int64, or a GenerateDecoderOnlyOutput with nothing but them where
    return_dict_in_generate is set. Raises ValueError, naming the argument, for what there is not: beams, assisted
    generation, contrastive search, a cache or mask of one's own, scores ...; otherwise as `decode`. For stop_strings
    give stopping_criteria=[StopStringCriteria(tokenizer, ...)]: transformers takes no tokenizer beside custom_generate.
    """
    given = _arguments_of_generate()
    streamer = given.get("streamer") if streamer is None else streamer
    drafting = {"heads": heads, "tree": tree, "gate": gate, "proposers": proposers}
    running = {"graphs": graphs, "fuse": fuse, "pack": pack}
    sequences: Any = _decoded(
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, given, seed,
        drafting | running, streamer=streamer,
    )  # fmt: skip
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


@ends_streamer
def _decoded(
    model: PreTrainedModel, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList,
    config: GenerationConfig, model_kwargs: dict[str, Any], given: Mapping[str, Any], seed: int | None,
    drafting: dict[str, Any], *, streamer: Any,
) -> Tensor:  # fmt: skip
    """given: what the user gave to `generate`; drafting: of Decoder -> sequences (1, S + new)."""
    decoder = Decoder(model, **drafting)
    check_refused("generate: generation_config", config, _REFUSED)
    _check_arguments(model_kwargs, given)
    processors = LogitsProcessorList(processors)
    sampling = _sampling(processors, seed) if config.do_sample else {}
    max_length = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
    ends = [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()]
    return decoder.run(
        ids,
        streamer=None if streamer is None else _AfterPrompt(streamer),
        attention_mask=model_kwargs.get("attention_mask"),
        max_new_tokens=max(1, max_length - ids.shape[1]),  # `generate` writes a token before it looks
        eos_token_id=ends,
        stopping_criteria=[c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)],
        generation_config=GenerationConfig(),  # what it asks for is in the lists
        logits_processor=processors,
        **sampling,
    ).sequences


def _arguments_of_generate() -> Mapping[str, Any]:
    """The local variables of the `generate` that called; empty: none did.

    To a callable, transformers 5.6 to 5.24 hand neither the streamer nor the assistant, and caches and positions of the
    user's look like their own.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _check_arguments(model_kwargs: dict[str, Any], given: Mapping[str, Any]) -> None:
    if given.get("assistant_model") is not None:
        raise ValueError(f"generate: assistant_model must be None: {_ASSISTED}")
    if given.get("synced_gpus"):
        raise ValueError("generate: synced_gpus must not be set: the model is on one device")
    own = given.get("kwargs", {})
    for name, value in model_kwargs.items():
        if value is None or name in ("attention_mask", *_HARMLESS) or name in _PREPARED and name not in own:
            continue
        raise ValueError(f"generate: {name} must not be given: with cerberus_ext.generate the model gets tokens alone")


def _sampling(processors: LogitsProcessorList, seed: int | None) -> dict[str, Any]:
    """Options of `decode` for drawing as the processors do; those at their end that it knows are taken off.

    The other ways of cutting probabilities off (min_p, ...) stay, as rules that the host applies.
    """
    options: dict[str, Any] = {"temperature": 1.0}
    options["seed"] = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    for name, kind in _WARPERS.items():
        last = processors[-1] if processors else None
        if type(last) is kind and vars(last) == vars(kind(getattr(last, name))):  # as `generate` makes it
            options[name] = getattr(last, name)
            processors.pop()
    return options


class _AfterPrompt:
    """A streamer for what follows the prompt, which `generate` has handed out itself."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt = True

    def put(self, tokens: Tensor) -> None:
        if not self._prompt:
            self._streamer.put(tokens)
        self._prompt = False

    def end(self) -> None:
        """Is called for the user's own streamer."""
