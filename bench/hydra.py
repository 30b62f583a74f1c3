"""Sequential heads like Hydra's (arXiv 2402.05109), in plain PyTorch, to compare with.

    cerberus bench --way bench/hydra.py:FOLDER ...

Head k reads the hidden state and the embeddings of the tokens on the path so far: the root and the drafts of the k - 1
heads before it. So a step's drafts are made one depth after the other, and those after different nodes differ.

    inputs = concat(h, anchor_scale * embed[root], ..., anchor_scale * embed[draft k - 1])       (k + 1) D numbers
    x = h + silu(first[k] @ inputs + bias);  x = x + silu(upper[k, l] @ x + bias)  for l = 2..L
    drafts of head k: the best rows of the LM head's product with x

Differences to Hydra's own heads: residual layers that start at zero, the scaled anchor and the draft vocabulary, all
as in CerberusHeads, so that what is compared is the dependence on the path. `bench/train_hydra.py` trains them.

FOLDER holds config.json ({"hydra": the fields of CerberusConfig}) and model.safetensors.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cerberus_ext import CerberusConfig, StaticPolicy
from cerberus_ext.drafting.heads import CONFIG_FILE, WEIGHTS_FILE, input_matrix, output_matrix
from cerberus_ext.evaluation.ways import Context, Way, open_way


class HydraHeads(nn.Module):
    """K heads of L layers. New heads are zero: they predict what the target model predicts.

    first[k] (D, (k + 2) D); first_bias (K, D); upper (L - 1, K, D, D); upper_bias (L - 1, K, D); anchor_scale ();
    draft_vocab (Vd,) int64, where config.draft_vocab is set.
    """

    draft_vocab: Tensor | None

    def __init__(self, config: CerberusConfig) -> None:
        super().__init__()
        self.config = config
        size, heads, layers = config.hidden_size, config.num_heads, config.num_layers
        self.first = nn.ParameterList(torch.zeros(size, (k + 2) * size) for k in range(heads))
        self.first_bias = nn.Parameter(torch.zeros(heads, size))
        self.upper = nn.Parameter(torch.zeros(layers - 1, heads, size, size))
        self.upper_bias = nn.Parameter(torch.zeros(layers - 1, heads, size))
        self.anchor_scale = nn.Parameter(torch.ones(()))
        self.register_buffer("draft_vocab", None if config.draft_vocab is None else torch.arange(config.draft_vocab))
        self._bound: tuple[weakref.ref[nn.Module], HydraDrafter] | None = None

    def state(self, k: int, hidden: Tensor, path: Tensor, dtype: torch.dtype) -> Tensor:
        """What head k, counted from 0, projects: hidden (..., D), path (..., k + 1, D) the embeddings -> (..., D).

        dtype: of the products.
        """
        inputs = torch.cat([hidden, (path * self.anchor_scale).flatten(-2)], -1)
        state = hidden + F.silu(product(inputs, self.first[k], dtype) + self.first_bias[k])
        for weight, bias in zip(self.upper, self.upper_bias, strict=True):
            state = state + F.silu(product(state, weight[k], dtype) + bias[k])
        return state

    def bind(self, model: nn.Module) -> HydraDrafter:
        """Copies the heads as they are; bound to the same model again, it is the same copy."""
        if self._bound is not None and self._bound[0]() is model:
            return self._bound[1]
        for name, got in zip(("vocab_size", "hidden_size"), output_matrix(model).shape, strict=True):
            expected = getattr(self.config, name)
            if got != expected:
                raise ValueError(f"HydraHeads.bind: the heads are for {name} {expected}, the model has {got}")
        drafter = HydraDrafter(self, output_matrix(model).detach(), input_matrix(model).detach())
        self._bound = (weakref.ref(model), drafter)
        return drafter

    def save(self, folder: Path) -> None:
        """In the dtype of the parameters."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        contents = {"hydra": asdict(self.config)}
        for name, write in (
            (WEIGHTS_FILE, lambda file: save_file(tensors, file)),
            (CONFIG_FILE, lambda file: file.write_text(json.dumps(contents, indent=1) + "\n")),
        ):
            partial = folder / f"{name}.partial"
            write(partial)
            partial.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> HydraHeads:
        """Raises ValueError where the folder has no such heads."""
        try:
            contents = json.loads((folder / CONFIG_FILE).read_text())
            heads = cls(CerberusConfig.from_dict(contents["hydra"]))
            tensors = load_file(folder / WEIGHTS_FILE)
            heads.load_state_dict(tensors)
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"hydra.py: {folder} must be a folder with Hydra-like heads: {error}") from None
        return heads.to(tensors["first_bias"].dtype).eval().requires_grad_(False)


def product(inputs: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """inputs @ weight.T, computed in `dtype`, in the inputs' own."""
    return F.linear(inputs.to(dtype), weight.to(dtype)).to(inputs.dtype)


class Level(NamedTuple):
    """What one head has to draft in a tree: what follows the nodes of one depth that have children.

    paths (M, depth): the nodes from the root to each of these; children (C,): the nodes that follow them;
    rows, ranks (C,): whose child it is, counted from 0, and which draft; drafts: how many of each are needed.
    """

    paths: Tensor
    children: Tensor
    rows: Tensor
    ranks: Tensor
    drafts: int


@lru_cache(maxsize=256)
def levels_of(tree: StaticPolicy, device: torch.device) -> Sequence[Level]:
    """By depth, the root's children first."""
    paths: list[tuple[int, ...]] = [(0,)]
    for node in range(1, tree.size):
        paths.append((*paths[tree.parents[node]], node))
    found = []
    for depth in range(1, tree.depth + 1):
        children = [node for node in range(tree.size) if tree.depths[node] == depth]
        parents = sorted({tree.parents[node] for node in children})
        rows = [parents.index(tree.parents[node]) for node in children]
        ranks = [tree.ranks[node] for node in children]
        # Outside of inference mode, so that the tensors serve every caller.
        with torch.inference_mode(False):
            tensors = (torch.tensor(one, device=device) for one in ([paths[n] for n in parents], children, rows, ranks))
            found.append(Level(*tensors, max(ranks) + 1))
    return found


class HydraDrafter:
    """Heads bound to a model: stepper.Drafter's `draft_tree`."""

    def __init__(self, heads: HydraHeads, lm_head: Tensor, embeddings: Tensor) -> None:
        device = lm_head.device
        # Without native bfloat16 a CPU multiplies it several times slower than float32.
        native = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        self.dtype = heads.first_bias.dtype if native else torch.float32
        self.heads = HydraHeads(heads.config).requires_grad_(False)
        self.heads.load_state_dict(heads.state_dict())
        self.heads.to(device, self.dtype)
        self.embeddings = embeddings
        self.draft_vocab = self.heads.draft_vocab
        rows = lm_head if self.draft_vocab is None else lm_head[self.draft_vocab]
        self.projection = rows.to(self.dtype)

    def draft_tree(self, hidden: Tensor, root: Tensor, tree: StaticPolicy) -> Tensor:
        """hidden (B, D), root (B,) -> the tokens (B, N) of the tree's nodes."""
        tokens = root[:, None].repeat(1, tree.size)
        hidden = hidden.to(self.dtype)[:, None]
        for k, level in enumerate(levels_of(tree, root.device)):
            path = self.embeddings[tokens[:, level.paths]].to(self.dtype)  # (B, M, k + 1, D)
            states = self.heads.state(k, hidden.expand(-1, path.shape[1], -1), path, self.dtype)  # (B, M, D)
            drafts = (states @ self.projection.T).topk(level.drafts).indices[:, level.rows, level.ranks]  # (B, C)
            tokens[:, level.children] = drafts if self.draft_vocab is None else self.draft_vocab[drafts]
        return tokens


def ways(context: Context) -> list[Way]:
    """For `cerberus bench --way bench/hydra.py:FOLDER`."""
    if not context.argument:
        raise ValueError("bench: way hydra.py must be followed by the folder of its heads, hydra.py:FOLDER, got none")
    return [open_way(context, "hydra", HydraHeads.load(Path(context.argument)), "Hydra-like sequential heads")]
