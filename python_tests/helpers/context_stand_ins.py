"""Heads with a context layer, and proposers for steps that accept some of the drafts."""

from __future__ import annotations

from typing import Any

import torch
from proposer_stand_ins import KnowingMaker, wrong
from tiny_models import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting.context_layer import attention_sizes
from cerberus_ext.drafting.proposers import ProposerFactory


def heads_for(model: PreTrainedModel, dtype: torch.dtype = torch.float32, **changes: Any) -> CerberusHeads:
    """Random ones, whose context layer does something."""
    sizes = list(attention_sizes(model))
    width = model.get_input_embeddings().weight.shape[1]
    config = CerberusConfig("tiny", width, VOCAB, num_heads=3, context_layer=True, context_heads=sizes, **changes)
    torch.manual_seed(4)
    heads = CerberusHeads(config).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.normal_(std=0.2)
    return heads.to(dtype).eval()


def accepting(text: Tensor) -> list[ProposerFactory]:
    """Steps accept various numbers of drafts; beside them stand wrong ones, in front of them, too."""

    def sometimes(follows: list[int], most: int) -> tuple[list[int], list[float]]:
        found = follows[: min(len(follows) // 3 % 4, most)]
        return found, [0.5] * len(found)

    return [KnowingMaker(text, wrong(VOCAB, 0.6)), KnowingMaker(text, sometimes)]
