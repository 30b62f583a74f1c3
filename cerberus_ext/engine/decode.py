"""`decode`: one text by one call of a Decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..drafting.drafter import HeadsLike
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.tree import TreePolicy
from ..runtime.stats import DecodeOutput
from .decoder import Decoder
from .text import MAX_NEW_TOKENS, SLOTS, ends_streamer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@ends_streamer
def decode(
    model: PreTrainedModel,
    heads: HeadsLike | None,
    ids: Tensor | Sequence[int] | Mapping[str, Any],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    tree: int | TreePolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    acceptance: str = "exact",
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    stopping_criteria: list[Any] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: list[Any] | None = None,
    streamer: Any = None,
    slots: int = SLOTS,
    graphs: bool | None = None,
    fuse: bool | None = None,
    pack: bool | None = None,
) -> DecodeOutput:
    """Generates what `model` alone would, in fewer forwards.

    model: a decoder-only transformers model with a key/value cache (full or sliding attention), in evaluation mode, on
        one device. It is left as it was, also when this raises.
    heads: CerberusHeads, or anything else that drafts; None: only `proposers` draft. They never change the text. What
        is no draft (a probability that is 0 or no number, a token that the model does not have) is left out.
    ids: (B, S) or (S,) integers on the model's device, a list of them, a list of prompts of several lengths, or what a
        tokenizer returns (input_ids, and attention_mask): the prompts. attention_mask: None, or (B, S), zeros where a
        row has padding, at its left or right. Every row gets the text that it gets alone.
    max_new_tokens: at most so many tokens are generated, >= 0; fewer, with a warning, where a model that looks up its
        positions in a table has no more of them.
    tree: which drafts a step checks: a DynamicPolicy, or its number of nodes, those that are most likely right at this
        step, a StaticPolicy always the same of the heads' alone. None: the one that `calibrate` found for these heads
        on this device, with this dtype and, on a CPU, torch.get_num_threads(), if that was calibrated; where there is
        none, a DynamicPolicy.
    gate: whether to draft at a step, and with how many nodes, see gate.py. None: the calibrated one where the tree is,
        too; otherwise at every step.
    proposers: who drafts besides the heads, see proposers.py; None: the text's own past, `[SuffixProposer()]`, with
        a DynamicPolicy; a StaticPolicy has none.
    temperature: 0 takes the most likely token, as `model.generate(do_sample=False)` does. Above 0, tokens are drawn,
        with noise determined by seed and position, so that for a seed the text is the same whatever the heads, the tree
        and the gate; of several prompts, row r has the seed `seed + r`. Of those that are at least min_p times as
        probable as the best one, with the top_k and top_p of `ops.choose_tokens`.
    acceptance: "exact", or, for tokens that are drawn, "typical": likely drafts are accepted, too, though another token
        was drawn. That is lossy: the text depends on what is drafted, see `runtime.sampling.Typical`.
    generation_config: None: the model's. What it says about the logits (penalties, forbidden tokens, ...) is applied
        before a token is chosen, as in `generate`, see logit_rules.py; the other arguments do not come from it.
    logits_processor: transformers' own, applied after those, and called as by `generate`: once for each token, in
        order, with the text before it; perhaps also for tokens behind the one at which a stopping criterion ends the
        text. Steps with processors are not recorded.
    eos_token_id: token or tokens that end the text, included in it; None: those of the generation_config.
    stopping_criteria, streamer: transformers' own. A criterion gets None as its scores, as from `generate` without
        output_scores. The streamer gets the prompt when nothing more is refused; its `end` is called once, also where
        this raises or is interrupted. Of several prompts, a criterion sees each text by itself, (1, S), and there is no
        streamer: see `Decoder.stream`.
    slots: so many prompts are decoded at once, at most; a text that ends makes room for the next prompt.
    graphs: steps as CUDA graphs, see recordings.py. None: where possible; True: or an error; False: not.
    fuse: the target model's step as one native program, see runtime/fused; on a GPU as launches of a few kernels, which
        graphs record. The first decode with a model traces it, in less than a second. None: where possible; True: or an
        error; False: op by op.
    pack: whether a fused step copies the weights for the processor, which reads them faster then, on a GPU those that
        came out of a file of fewer bits; None: where there is memory for it; False: it reads the model's own.

    Returns sequences (B, S + new) int64, shorter texts filled up with the pad token as by `generate`, and stats, of
    several prompts their sum, with `stats.rows`; `stats.exact` tells whether drafts can never change a token, see
    capability.py. Raises TypeError or ValueError, naming the argument, where one is wrong or the generation_config
    asks for what there is not (beams, ...), and RuntimeError while the same model is already decoding.
    Source: arXiv 2410.13344.
    """
    decoder = Decoder(model, heads, tree=tree, gate=gate, proposers=proposers, graphs=graphs, fuse=fuse, pack=pack)
    return decoder.run(
        ids, streamer=streamer, attention_mask=attention_mask, max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, acceptance=acceptance, eos_token_id=eos_token_id,
        stopping_criteria=stopping_criteria, generation_config=generation_config, logits_processor=logits_processor,
        slots=slots,
    )  # fmt: skip
