"""`generate`: what transformers' `model.generate(custom_generate=...)` calls in the place of its own loop."""

from __future__ import annotations

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
_ALONE = "nothing but sequences is returned"
# Fields of the generation_config, as in REFUSED. transformers has made stopping criteria of two of those.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{field: row for field, row in REFUSED.items() if field not in ("max_time", "stop_strings")},
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), (bool, _ASSISTED)),
    **dict.fromkeys((f"output_{what}" for what in ("scores", "logits", "attentions", "hidden_states")), (bool, _ALONE)),
}
_PREPARED = ("position_ids", "cache", "past_key_values", "cache_params")  # made by `generate` where the user gives none
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
    with prompts (B, S), padded left or right; transformers prepares them and calls this. Its logits processors must
    look at nothing but their arguments: those of the same place may be called more than once.
    do_sample: tokens are drawn from the same probabilities as by `generate`, but with the noise of `decode`, by seed
        and position: other tokens than those of `generate`, and the same with and without drafts. seed None: one is
        drawn from torch's generator, so that torch.manual_seed determines the text here, too.
    streamer: gets what `generate` gives it, of one prompt; its `end` is called once, also where this raises.

    Returns sequences (B, S + new) int64, or a GenerateDecoderOnlyOutput with nothing but them where
    return_dict_in_generate is set. Raises ValueError, naming the argument, for what there is not: beams, assisted
    generation, contrastive search, a cache or mask of one's own, scores ...; otherwise as `decode`. For stop_strings
    give stopping_criteria=[StopStringCriteria(tokenizer, ...)]: transformers takes no tokenizer beside custom_generate.
    """
    given = _arguments_of_generate()

    @ends_streamer
    def decoded(*, streamer: Any) -> Any:
        decoder = Decoder(model, heads, tree=tree, gate=gate, proposers=proposers, graphs=graphs, fuse=fuse, pack=pack)
        check_refused("generate: generation_config", generation_config, _REFUSED)
        _check_arguments(model_kwargs, given)
        options = _options(input_ids.shape[1], logits_processor, stopping_criteria, generation_config.pad_token_id)
        if generation_config.do_sample:
            options |= _sampling(options["logits_processor"], seed)
        put_to = None if streamer is None else _AfterPrompt(streamer)
        return decoder.run(input_ids, streamer=put_to, attention_mask=model_kwargs.get("attention_mask"), **options)

    sequences = decoded(streamer=given.get("streamer") if streamer is None else streamer).sequences
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences


def _arguments_of_generate() -> Mapping[str, Any]:
    """The local variables of the `generate` that called; empty: none did.

    To a callable, transformers 5.6 to 5.24 hand neither the streamer nor the assistant, and caches and positions of the
    user's look like their own.
    """
    sought = ("generate", GenerationMixin.__module__)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_name, frame.f_globals.get("__name__")) != sought:
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


def _options(
    length: int, processors: LogitsProcessorList, criteria: StoppingCriteriaList, pad: int | None
) -> dict[str, Any]:
    """What transformers has made of the arguments, as options of `decode`. length: the prompts'. pad: their padding."""
    max_length = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
    return {
        "max_new_tokens": max(1, max_length - length),  # `generate` writes a token before it looks
        "eos_token_id": [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()],
        "stopping_criteria": [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)],
        "generation_config": GenerationConfig(pad_token_id=pad),  # all else that it asks for is in the lists
        "logits_processor": LogitsProcessorList(processors),
    }


def _sampling(processors: LogitsProcessorList, seed: int | None) -> dict[str, Any]:
    """Options of `decode` for drawing as the processors do; those at their end that it knows are taken off.

    The other ways of cutting probabilities off (min_p, ...) stay: they are applied like rules.
    """
    options: dict[str, Any] = {"temperature": 1.0}
    options["seed"] = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    for name, kind in _WARPERS.items():
        last: Any = processors[-1] if processors else None
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
