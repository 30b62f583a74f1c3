"""Trains the heads of hydra.py as `cerberus train` trains its own: same data, loss, schedule and measurements.

    python bench/train_hydra.py --data answers.jsonl --output hydra-heads [--model MODEL] [--steps 4000] ...

A run that is killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import HydraHeads
from torch import Tensor

from cerberus_ext import load_default_model
from cerberus_ext.io.default_model import HUB_ID, load_model
from cerberus_ext.training.checkpoint import digest
from cerberus_ext.training.held_out import ROWS, HeldOut
from cerberus_ext.training.options import TrainOptions
from cerberus_ext.training.positions import Positions
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.record import CARD_FILE
from cerberus_ext.training.self_distill import load_data
from cerberus_ext.training.trainer import Trainer


class HydraTrainer(Trainer):
    """The trainer, with other heads. Where it has the token that a state produced, here are the K tokens from there on,
    those of the text: a draft is of use only where the ones before it on its path are right.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        cerberus = self.heads
        self.heads = HydraHeads(cerberus.config).to(self.device)  # type: ignore[assignment]
        self.heads.anchor_scale.data.copy_(cerberus.anchor_scale)
        if cerberus.draft_vocab is not None:
            self.heads.draft_vocab.copy_(cerberus.draft_vocab)
        self.start = digest(self.heads.state_dict())
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=self.options.lr, weight_decay=0.0)
        if self.held_out is not None:
            self.held_out.__class__ = HydraHeldOut

    def states(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden (N, D), tokens (N, K), which may be flat: the one that each produced and those after it -> (K, N, D).

        tokens (N,): the same one K times, where only the time counts.
        """
        heads = self.options.heads
        hidden = hidden.to(self.device, torch.float32)
        tokens = tokens.to(self.device).view(len(hidden), -1).expand(-1, heads)
        path = self.embeddings[tokens].float()  # (N, K, D)
        return torch.stack([self.heads.state(k, hidden, path[:, : k + 1], self.dtype) for k in range(heads)])

    def positions(self, epoch: int, number: int) -> Positions:
        """tokens: (T, K)"""
        data = super().positions(epoch, number)
        if data.tokens.dim() == 1:  # the window is new
            data.tokens = following(data.tokens, self.options.heads)
        return data

    def measure(self, loss: float) -> None:
        super().measure(loss)
        (self.options.output / CARD_FILE).unlink(missing_ok=True)  # a card of CerberusHeads

    def save_heads(self) -> None:
        kept = HydraHeads(self.heads.config)
        kept.load_state_dict(self.heads.state_dict())
        kept.to(torch.bfloat16).save(self.options.output)


class HydraHeldOut(HeldOut):
    def ranks(self, read: Tensor, states: Callable[[Tensor, Tensor], Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """As of HeldOut, which asks for the states of ROWS positions after the other."""
        paths = iter(following(self.tokens, heads).split(ROWS))
        return super().ranks(read, lambda hidden, tokens: states(hidden, next(paths)), heads)


def following(tokens: Tensor, count: int) -> Tensor:
    """tokens (T,) -> (T, count): each of them and those after it; beyond the end, the last one."""
    rows = torch.arange(len(tokens))[:, None] + torch.arange(count)
    return tokens[rows.clamp(max=len(tokens) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help='JSON lines: {"p": prompt ids, "r": answer ids}')
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="folder or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="folder for hidden states, `cerberus train`'s will do")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--device")
    defaults = TrainOptions(Path())
    for name in ("heads", "layers", "draft_vocab", "steps", "batch", "lr", "warmup", "eval_every", "patience", "seed"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if value is None else type(value), default=value)
    given = vars(parser.parse_args())
    name, dtype, device = given.pop("model"), getattr(torch, given.pop("dtype")), given.pop("device")
    model, _ = load_default_model(dtype, device) if name is None else load_model(name, dtype, device)
    options = TrainOptions(base_model=name or HUB_ID, **given)
    with Processes() as processes:
        answers, made = load_data(model, None, options, processes)
        HydraTrainer(model, answers, options, processes, made).run()


if __name__ == "__main__":
    main()
