"""The heads that a run begins with: new ones, which draft what the target model says next, or trained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..drafting.context_layer import attention_sizes
from ..drafting.heads import CerberusConfig, CerberusHeads, fingerprint, input_matrix, output_matrix
from .options import DRAFT_VOCAB, TrainOptions


def start_heads(model: nn.Module, options: TrainOptions, tokens: Tensor, hidden_rms: float) -> CerberusHeads:
    """Heads in float32 on the model's device.

    tokens (T,): of the training answers, whose most frequent ones are the draft vocabulary. hidden_rms: root mean
    square of the hidden states, which the anchor is scaled to.
    """
    embeddings, config = input_matrix(model), heads_config(model, options)
    heads = CerberusHeads(config)
    if heads.draft_vocab is not None:
        heads.draft_vocab.copy_(frequent_tokens(tokens, len(heads.draft_vocab), config.vocab_size))
    if heads.anchor_scale is not None:
        heads.anchor_scale.data.fill_(hidden_rms / embeddings.detach().float().square().mean().sqrt().item())
    if heads.context is not None:
        heads.context.draw(hidden_rms, options.seed)
    if options.init is not None:
        copy_trained(trained_heads(options.init, config), heads)
    return heads.to(output_matrix(model).device)


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
        lm_head_fingerprint=fingerprint([lm_head]),
    )


def trained_heads(name: str, config: CerberusConfig) -> CerberusHeads:
    """The heads `name`, for `copy_trained` into heads of `config`.

    Raises ValueError, naming the number, where one differs that is not the layers' or the draft vocabulary's.
    """
    try:
        trained = CerberusHeads.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"train: init: {error}") from None
    for field in ("hidden_size", "vocab_size", "num_heads", "anchor", "chained", "context_heads", "num_layers"):
        expected, got = getattr(config, field), getattr(trained.config, field)
        if field == "num_layers" and got > expected:
            raise ValueError(f"train: num_layers of init must be at most {expected}, got {got}")
        optional = field == "num_layers" or field == "context_heads" and got is None
        if got != expected and not optional:
            raise ValueError(f"train: {field} of init must be {expected}, got {got}")
    return trained


def copy_trained(trained: CerberusHeads, heads: CerberusHeads) -> None:
    """Puts the weights of `trained` into `heads`, which may have more layers, a context layer and another vocabulary.

    A layer of zeros adds silu(0) = 0 to a state, so heads with more layers draft what the trained ones do. A new
    context layer adds nothing, either.
    """
    layers = trained.config.num_layers
    with torch.no_grad():
        heads.weight[:layers] = trained.weight
        heads.bias[:layers] = trained.bias
        if heads.anchor_scale is not None and trained.anchor_scale is not None:
            heads.anchor_scale.copy_(trained.anchor_scale)
        if heads.context is not None and trained.context is not None:
            heads.context.load_state_dict(trained.context.state_dict())
