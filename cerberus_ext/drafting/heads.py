"""Cerberus heads: what they are made of, how they are saved, and how they are bound to a target model.

Heads and model stay apart: binding changes neither, and nothing of a model is ever saved with heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from .. import ops
from ..io.heads_file import (
    CARD_FILE,
    CONFIG_FILE,
    HUB_ID,
    WEIGHTS_FILE,
    check_folder,
    read_config,
    read_tensors,
    write_heads,
)
from .conditional import ConditionalDrafts
from .context_layer import ContextLayer, attention_sizes
from .heads_config import CerberusConfig
from .heads_drafter import HeadsDrafter

PRETRAINED = Path(__file__).parent.parent / "pretrained"


class CerberusHeads(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cerberus_ext",
    tags=["speculative-decoding"],
    paper_url="https://arxiv.org/abs/2410.13344",
):
    """K heads of L layers. New heads are zero: they predict what the target model predicts.

    weight        (L, K, D, 2D), or (L, K, D, D) when not chained
    bias          (L, K, D)
    anchor_scale  ()    what the pending token's embedding is multiplied by; only with anchor="root" and chained
    draft_vocab   (Vd,) int64, ascending token ids; only when config.draft_vocab is set
    context       ContextLayer; only when config.context_layer is set
    conditional   ConditionalDrafts; only when config.conditional_rank is set

    folder: where they were loaded from, None where that is no folder.
    """

    anchor_scale: nn.Parameter | None
    draft_vocab: Tensor | None
    context: ContextLayer | None
    conditional: ConditionalDrafts | None
    folder: Path | None = None

    def __init__(self, config: CerberusConfig) -> None:
        super().__init__()
        self.config = config
        size, heads, layers = config.hidden_size, config.num_heads, config.num_layers
        self.weight = nn.Parameter(torch.zeros(layers, heads, size, 2 * size if config.chained else size))
        self.bias = nn.Parameter(torch.zeros(layers, heads, size))
        scaled = config.chained and config.anchor == "root"
        self.register_parameter("anchor_scale", nn.Parameter(torch.ones(())) if scaled else None)
        ids = None if config.draft_vocab is None else torch.arange(config.draft_vocab)
        self.register_buffer("draft_vocab", ids)
        query_heads, kv_heads, head_size = config.context_heads or (0, 0, 0)
        self.context = ContextLayer(size, (query_heads, kv_heads, head_size)) if config.context_layer else None
        rank = config.conditional_rank
        self.conditional = None if rank is None else ConditionalDrafts(size, heads, rank)

    def forward(self, hidden: Tensor, anchor: Tensor) -> Tensor:
        """hidden, anchor (B, D) of the heads' dtype -> states (B, K, D), without a gradient.

        `training.distill.head_states` computes the same with one.
        """
        return ops.head_stack(hidden, anchor, self.weight.detach(), self.bias.detach())

    def bind(self, model: nn.Module, *, check_fingerprint: bool = True) -> HeadsDrafter:
        """Checks that the heads fit `model`, a transformers causal LM, and returns what drafts for it.

        Neither the heads nor the model change. The drafter works in the heads' dtype on the model's device;
        the LM head is copied only as far as draft_vocab, dtype or device make it necessary.
        Raises ValueError as `check_fit`; `check_fingerprint=False` lets another LM head of the same shape pass.
        """
        self.check_fit(model, check_fingerprint=check_fingerprint)
        return HeadsDrafter(self, output_matrix(model), input_matrix(model))

    def check_fit(self, model: nn.Module, *, check_fingerprint: bool = True) -> None:
        """Raises ValueError, naming the number that differs, when the model's hidden size, vocabulary or LM head are
        other ones than the heads were trained for."""
        lm_head, embeddings = output_matrix(model), input_matrix(model)
        config = self.config
        for name, got in (("hidden_size", lm_head.shape[1]), ("vocab_size", lm_head.shape[0])):
            expected = getattr(config, name)
            if got != expected:
                raise ValueError(
                    f"CerberusHeads.bind: the heads are for {name} {expected} ({config.base_model}),"
                    f" the model has {got}"
                )
        reads_embeddings = self.anchor_scale is not None or self.conditional is not None
        if embeddings.shape[1] != config.hidden_size and reads_embeddings:
            raise ValueError(
                'CerberusHeads.bind: anchor="root" and conditional drafts need embeddings of size'
                f" {config.hidden_size}, the model has {embeddings.shape[1]}"
            )
        if self.context is not None and attention_sizes(model) != self.context.sizes:
            raise ValueError(
                "CerberusHeads.bind: the heads' context layer is for query heads, key heads and head size"
                f" {self.context.sizes}, the model has {attention_sizes(model)}"
            )
        if check_fingerprint and config.lm_head_fingerprint is not None:
            got_print = fingerprint([lm_head])
            if got_print != config.lm_head_fingerprint:
                raise ValueError(
                    f"CerberusHeads.bind: the heads were trained on the LM head {config.lm_head_fingerprint}"
                    f" ({config.base_model}), the model's is {got_print};"
                    " check_fingerprint=False binds them all the same"
                )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes config.json, model.safetensors and, where there is none, README.md; each whole or not at all.

        Heads that are there already are written over. Other arguments, and what is returned: those of huggingface_hub's
        mixin. Raises ValueError where files of these names are not of heads, OSError where they cannot be written.
        """
        folder = Path(save_directory)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(folder)
        if not (folder / CARD_FILE).exists():
            self.generate_model_card(**model_card_kwargs or {}).save(folder / CARD_FILE)
        if not push_to_hub:
            return None
        push_to_hub_kwargs.pop("config", None)  # it is in `_save_pretrained`'s file
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_heads(save_directory, self.state_dict(), asdict(self.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> CerberusHeads:
        """Loads heads in the dtype they were saved in.

        pretrained_model_name_or_path: the name of heads that this package brings ("smollm2-135m-instruct"),
        a folder, or a Hub id; tried in this order. kwargs, for the Hub: revision, token, cache_dir, force_download,
        local_files_only.
        Raises OSError where a file is missing or cannot be read, ValueError where one does not hold what heads are made
        of; both name the file and the reason.
        """
        name = str(pretrained_model_name_or_path)
        folder = PRETRAINED / name if name in packaged_names() else Path(name)
        if folder.is_dir():
            return cls._from_files(folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder.resolve())
        if folder.exists():
            raise NotADirectoryError(f"CerberusHeads.from_pretrained: {name} is a file, not a folder of heads")
        if not HUB_ID.fullmatch(name):
            raise ValueError(
                f"CerberusHeads.from_pretrained: {name!r} is no folder, no Hub id (user/name)"
                f" and none of the packaged heads: {', '.join(packaged_names()) or 'there are none'}"
            )
        files = [hf_hub_download(repo_id=name, filename=file, **kwargs) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        return cls._from_files(Path(files[0]), Path(files[1]), None)

    @classmethod
    def _from_files(cls, config_file: Path, weights_file: Path, folder: Path | None) -> CerberusHeads:
        who = "CerberusHeads.from_pretrained"
        if not config_file.exists():
            raise ValueError(f"{who}: {config_file.parent} has no {CONFIG_FILE}")
        try:
            values = read_config(config_file)
            if "model_type" in values:
                raise ValueError(f"it is of a model ({values['model_type']}), not of heads")
            config = CerberusConfig.from_dict(values)
            with torch.device("meta"):
                expected = cls(config).state_dict()  # shapes, which are compared before memory is taken for them
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{who}: {config_file}: {error}") from error
        try:
            tensors = read_tensors(weights_file, expected, config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
        heads = cls(config).to(tensors["weight"].dtype)
        heads.load_state_dict(tensors)
        heads.folder = folder
        return heads.eval().requires_grad_(False)


def packaged_names() -> list[str]:
    """Names of the heads that this package brings."""
    return sorted(file.parent.name for file in PRETRAINED.glob(f"*/{CONFIG_FILE}"))


def output_matrix(model: Any) -> Tensor:
    """The (V, D) matrix of the LM head. Heads draft through a plain product with it, so a bias is refused."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"CerberusHeads: the model must be a causal LM with an LM head, got {type(model).__name__}")
    if getattr(layer, "bias", None) is not None:
        raise ValueError("CerberusHeads: the model's LM head must have no bias, got one")
    return layer.weight


def input_matrix(model: Any) -> Tensor:
    """The (V, D) matrix of the token embeddings."""
    return model.get_input_embeddings().weight


def fingerprint(tensors: Iterable[Tensor], rows: int = 256) -> str:
    """16 hex digits that tell weights apart: sha256 of their shapes and signs.

    Taken from up to `rows` evenly spaced rows of each tensor. Signs, because they are the same whether the
    weights were loaded in float32, bfloat16 or float16.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        count = flat.shape[0]
        chosen = torch.arange(min(rows, count), device=flat.device) * count // min(rows, count)
        digest.update(torch.signbit(flat[chosen]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
