"""The heads that a run begins with: new ones, which draft what the target model says next, or trained ones."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..drafting.context_layer import attention_sizes
from ..drafting.heads import CerberusConfig, CerberusHeads, fingerprint, input_matrix, output_matrix
from .options import DRAFT_VOCAB, TrainOptions

SAME = ("hidden_size", "vocab_size", "num_heads", "anchor", "chained")  # of heads that are trained on
OPTIONAL = ("context_heads", "conditional_rank")  # the same, or not there: then they are new
CONDITIONAL_RATE = 4.0  # times the heads' learning rate
CONDITIONAL_DECAY, CONDITIONAL_BETAS = 0.1, (0.9, 0.99)


def start_heads(model: nn.Module, options: TrainOptions, tokens: Tensor, hidden_rms: float) -> CerberusHeads:
    """Heads in float32 on the model's device.

    tokens (T,): of the training answers, whose most frequent ones are the draft vocabulary. hidden_rms: root mean
    square of the hidden states, which the anchor is scaled to.
    """
    embeddings, config = input_matrix(model), heads_config(model, options)
    heads = CerberusHeads(config)
    trained = None if options.init is None else trained_heads(options.init, config)
    if heads.draft_vocab is not None:
        kept = trained.draft_vocab if options.only and trained is not None else None
        most = frequent_tokens(tokens, len(heads.draft_vocab), config.vocab_size) if kept is None else kept
        heads.draft_vocab.copy_(most)
    if heads.anchor_scale is not None:
        heads.anchor_scale.data.fill_(hidden_rms / embeddings.detach().float().square().mean().sqrt().item())
    if heads.context is not None:
        heads.context.draw(hidden_rms, options.seed)
    if trained is not None:
        copy_trained(trained, heads)
        if options.only:
            heads.config.accuracy, heads.config.paths = trained.config.accuracy, trained.config.paths
    return heads.to(output_matrix(model).device)


def of_init(options: TrainOptions) -> TrainOptions:
    """The options with what `init` says of heads that are not trained; others as they are.

    Raises ValueError where options say otherwise, and where there are no such heads.
    """
    if options.only is None or options.init is None:
        return options
    config = _load(options.init).config
    own: dict[str, Any] = {
        "heads": config.num_heads,
        "layers": config.num_layers,
        "draft_vocab": config.draft_vocab or 0,
    }
    own |= {name: getattr(config, name) for name in ("anchor", "chained", "context_layer")}
    for field in fields(options):
        given = getattr(options, field.name)
        if field.name in own and given not in (field.default, own[field.name]):
            raise ValueError(f"train: {field.name} must be that of init with only, {own[field.name]}, got {given}")
    return replace(options, **own)


def parameter_groups(heads: CerberusHeads, lr: float, only: str | None) -> list[dict[str, Any]]:
    """What AdamW trains: the heads, but with `only`, and the conditional drafts, the matrices of which decay."""
    groups: list[dict[str, Any]] = []
    drafts = heads.conditional
    if only is None:
        own = [part for name, part in heads.named_parameters() if not name.startswith("conditional.")]
        groups.append({"params": own, "initial_lr": lr})
    else:
        heads.requires_grad_(False)
    if drafts is not None:
        drafts.requires_grad_(True)
        rate = {"initial_lr": lr if only else CONDITIONAL_RATE * lr, "betas": CONDITIONAL_BETAS}
        groups.append({"params": [drafts.queries, drafts.keys], "weight_decay": CONDITIONAL_DECAY, **rate})
        groups.append({"params": [drafts.slopes, drafts.rest], **rate})
    return groups


def frequent_tokens(tokens: Tensor, count: int, vocab_size: int) -> Tensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and the never seen go to the lowest ids."""
    order = torch.bincount(tokens, minlength=vocab_size).sort(descending=True, stable=True).indices
    return order[:count].sort().values


def heads_config(model: nn.Module, options: TrainOptions) -> CerberusConfig:
    """Raises ValueError where the options and the model make none."""
    lm_head, embeddings = output_matrix(model), input_matrix(model)
    vocab_size, size = lm_head.shape
    draft_vocab = min(DRAFT_VOCAB, vocab_size) if options.draft_vocab is None else options.draft_vocab
    if draft_vocab > vocab_size:
        raise ValueError(f"train: draft_vocab must be at most the vocabulary, {vocab_size}, got {draft_vocab}")
    if options.anchor == "root" and options.chained and embeddings.shape[1] != size:
        raise ValueError(f'train: anchor "root" needs embeddings of size {size}, the model has {embeddings.shape[1]}')
    if options.conditional_rank is not None and embeddings.shape[1] != size:
        raise ValueError(
            f"train: conditional_rank needs embeddings of size {size}, the model has {embeddings.shape[1]}"
        )
    return CerberusConfig(
        base_model=options.base_model,
        hidden_size=size,
        vocab_size=vocab_size,
        num_heads=options.heads,
        num_layers=options.layers,
        anchor=options.anchor,
        chained=options.chained,
        draft_vocab=None if draft_vocab in (0, vocab_size) else draft_vocab,
        context_layer=options.context_layer,
        context_heads=list(attention_sizes(model)) if options.context_layer else None,
        conditional_rank=options.conditional_rank,
        lm_head_fingerprint=fingerprint([lm_head]),
    )


def trained_heads(name: str, config: CerberusConfig) -> CerberusHeads:
    """The heads `name`, for `copy_trained` into heads of `config`.

    Raises ValueError, naming the number, where one differs that is not the layers' or the draft vocabulary's.
    """
    trained = _load(name)
    for field in (*SAME, *OPTIONAL, "num_layers"):
        expected, got = getattr(config, field), getattr(trained.config, field)
        if field == "num_layers" and got > expected:
            raise ValueError(f"train: num_layers of init must be at most {expected}, got {got}")
        optional = field == "num_layers" or field in OPTIONAL and got is None
        if got != expected and not optional:
            raise ValueError(f"train: {field} of init must be {expected}, got {got}")
    return trained


def copy_trained(trained: CerberusHeads, heads: CerberusHeads) -> None:
    """Puts the weights of `trained` into `heads`, which may have more layers, a context layer and another vocabulary.

    A layer of zeros adds silu(0) = 0 to a state, so heads with more layers draft what the trained ones do. A new
    context layer adds nothing, either, and new conditional drafts leave drafts as they are.
    """
    layers = trained.config.num_layers
    with torch.no_grad():
        heads.weight[:layers] = trained.weight
        heads.bias[:layers] = trained.bias
        if heads.anchor_scale is not None and trained.anchor_scale is not None:
            heads.anchor_scale.copy_(trained.anchor_scale)
        if heads.context is not None and trained.context is not None:
            heads.context.load_state_dict(trained.context.state_dict())
        if heads.conditional is not None and trained.conditional is not None:
            heads.conditional.load_state_dict(trained.conditional.state_dict())


def _load(name: str) -> CerberusHeads:
    try:
        return CerberusHeads.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"train: init: {error}") from None
