"""The training loop: batches, optimizer, checkpoints. `train.train` is what users call."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..heads import CerberusConfig, CerberusHeads, fingerprint, input_matrix, output_matrix
from .data import TrainingData
from .distill import distillation, frequent_tokens, head_states, learning_rate
from .held_out import BEST_SIZE, HeldOut
from .record import RECORD_FILE, record

SEGMENT = 8  # consecutive positions drawn together: they share teacher rows, 8 + K - 1 instead of 8 * K
CHECKPOINT_FILE = "checkpoint.safetensors"
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step")
PATHS = ("data", "output", "cache")  # options that say where, not what


@dataclass
class TrainOptions:
    """What `train` is asked to do.

    data         JSONL of {"p": prompt ids, "r": answer ids, "t": temperature (optional)}
    output       folder for the heads
    cache        folder for the hidden states; None: "hidden" inside output
    base_model   the model's name, for the record
    heads, layers, anchor, chained    see CerberusConfig
    draft_vocab  rows of the LM head to project to, those of the most frequent tokens; 0: all
    batch        positions a step, a multiple of SEGMENT
    lr, warmup   highest learning rate, and steps until it is reached; then a cosine
    head_decay   head k counts head_decay ** (k - 1) in the loss
    clip         largest norm of the gradient
    held_out     share of the lines, the last ones, that only measure
    eval_every   steps between measurements, each with a checkpoint
    seed         of the order of the data
    """

    data: Path
    output: Path
    cache: Path | None = None
    base_model: str = "unknown"
    heads: int = 4
    layers: int = 2
    anchor: str = "root"
    chained: bool = True
    draft_vocab: int = 8192
    steps: int = 4000
    batch: int = 256
    lr: float = 5e-4
    warmup: int = 100
    head_decay: float = 0.8
    clip: float = 1.0
    held_out: float = 0.02
    eval_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        positive, natural = ("heads", "layers", "steps", "eval_every"), ("draft_vocab", "warmup")
        for name in positive + natural:
            least = 1 if name in positive else 0
            if getattr(self, name) < least:
                raise ValueError(f"train: {name} must be >= {least}, got {getattr(self, name)}")
        if self.batch < SEGMENT or self.batch % SEGMENT:
            raise ValueError(f"train: batch must be a positive multiple of {SEGMENT}, got {self.batch}")
        for name in ("lr", "clip", "head_decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be > 0, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"train: held_out must be between 0 and 1, got {self.held_out}")

    def numbers(self) -> dict[str, Any]:
        """The options that decide what comes out."""
        return {key: value for key, value in asdict(self).items() if key not in PATHS}


class Trainer:
    """One run: heads, optimizer, how far it got. The model is only read."""

    def __init__(self, model: nn.Module, data: TrainingData, options: TrainOptions) -> None:
        self.options, self.data = options, data
        lm_head, embeddings = output_matrix(model).detach().float(), input_matrix(model).detach().float()
        self.device = lm_head.device
        self.embeddings = embeddings
        self.train_rows = self.first_held_out_row()

        vocab_size, size = lm_head.shape
        draft_vocab = None if options.draft_vocab in (0, vocab_size) else options.draft_vocab
        config = CerberusConfig(
            base_model=options.base_model,
            hidden_size=size,
            vocab_size=vocab_size,
            num_heads=options.heads,
            num_layers=options.layers,
            anchor=options.anchor,
            chained=options.chained,
            draft_vocab=draft_vocab,
            lm_head_fingerprint=fingerprint([output_matrix(model)]),
        )
        self.heads = CerberusHeads(config).to(self.device)
        ids = torch.arange(vocab_size)
        if self.heads.draft_vocab is not None:
            ids = frequent_tokens(data.tokens[: self.train_rows], len(self.heads.draft_vocab), vocab_size)
            self.heads.draft_vocab.copy_(ids)
        self.projection = lm_head if draft_vocab is None else lm_head[self.heads.draft_vocab]
        self.draft_index = torch.full((vocab_size,), -1)
        self.draft_index[ids] = torch.arange(len(ids))
        if self.heads.anchor_scale is not None:
            rms = (
                data.hidden[: self.train_rows : 97].float().square().mean().sqrt()
                / embeddings.square().mean().sqrt()
            )
            self.heads.anchor_scale.data.fill_(rms)

        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=options.lr, weight_decay=0.0)
        self.held_out = HeldOut(data, self.train_rows, lm_head, self.projection, self.draft_index)
        self.order: tuple[int, Tensor] | None = None  # the epoch, and its shuffled segments
        self.step = 0
        self.seconds = 0.0
        self.best = -1.0
        self.curve: list[dict[str, Any]] = []

    def first_held_out_row(self) -> int:
        """Held out are whole lines, the last ones of the file."""
        lines = int(self.data.lines[-1]) + 1
        held_lines = max(1, round(lines * self.options.held_out))
        rows = int((self.data.lines < lines - held_lines).sum())
        needed = self.options.batch + 2 * SEGMENT
        if rows < needed:
            raise ValueError(
                f"train: data must have at least {needed} answer tokens before the held-out lines, got {rows}"
            )
        return rows

    def batch_starts(self, step: int) -> Tensor:
        """First rows of the segments of a step: every epoch in another order and from another offset, drawn
        from the seed and the epoch alone, so that a resumed run sees what an uninterrupted one would."""
        per_step = self.options.batch // SEGMENT
        segments = self.train_rows // SEGMENT - 1  # one less than fit, which leaves room for the offset
        epoch, index = divmod(step, segments // per_step)
        if self.order is None or self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            offset = int(torch.randint(SEGMENT, (), generator=generator))
            self.order = (epoch, torch.randperm(segments, generator=generator) * SEGMENT + offset)
        return self.order[1][index * per_step : (index + 1) * per_step]

    def states(self, rows: Tensor) -> Tensor:
        """Final states (K, N, D) at the rows (N,) of the data."""
        hidden = self.data.hidden[rows].to(self.device, torch.float32)
        anchor = hidden
        if self.heads.anchor_scale is not None:
            anchor = self.embeddings[self.data.tokens[rows].to(self.device)] * self.heads.anchor_scale
        return head_states(hidden, anchor, self.heads.weight, self.heads.bias)

    def train_step(self) -> float:
        """One step of AdamW; returns the loss before it."""
        options, data = self.options, self.data
        starts = self.batch_starts(self.step)[:, None]
        rows = starts + torch.arange(SEGMENT)
        ahead = starts + torch.arange(1, SEGMENT + options.heads)
        ahead = ahead.clamp(
            max=len(data.hidden) - 1
        )  # rows of another answer, or none: `left` leaves them out
        teacher = data.hidden[ahead].to(self.device, torch.float32) @ self.projection.T
        states = self.states(rows.flatten())
        left = data.left[rows].to(self.device)
        loss, gradient = distillation(states.detach(), self.projection, teacher, left, options.head_decay)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"train: loss must be finite, got {loss.item()} at step {self.step};"
                f" a lower lr than {options.lr} may help"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, options.steps, options.warmup, options.lr)
        self.optimizer.zero_grad()
        states.backward(gradient)
        nn.utils.clip_grad_norm_(self.heads.parameters(), options.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def run(self) -> None:
        """Trains to the last step, from the output folder's checkpoint if it has one."""
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        if self.load_checkpoint():
            tqdm.write(f"resuming at step {self.step} of {options.steps}")
        started, losses = time.perf_counter() - self.seconds, []
        with tqdm(total=options.steps, initial=self.step, desc="training", unit="step") as bar:
            while self.step < options.steps:
                losses.append(self.train_step())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_step=self.best, refresh=False)
                bar.update()
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    self.seconds = time.perf_counter() - started
                    self.measure(sum(losses) / len(losses))
                    losses.clear()

    def measure(self, loss: float) -> None:
        """Adds a point to the curve, saves the heads if they are the best so far, writes checkpoint and record."""
        result = self.held_out.measure(self.states, self.options.heads)
        point = {
            "step": self.step,
            "loss": round(loss, 4),
            "seconds": round(self.seconds),
            "top1": result.top1,
            "top3": result.top3,
            "tokens_per_step": result.tokens_per_step,
        }
        self.curve.append(point)
        tqdm.write(json.dumps(point))
        if result.tokens_per_step[BEST_SIZE] > self.best:
            self.best = result.tokens_per_step[BEST_SIZE]
            self.heads.config.paths = [list(path) for path in result.paths]
            self.heads.config.accuracy = result.accuracy
            kept = CerberusHeads(self.heads.config)
            kept.load_state_dict(self.heads.state_dict())
            kept.to(torch.bfloat16).save_pretrained(self.options.output)
        self.save_checkpoint()
        (self.options.output / RECORD_FILE).write_text(json.dumps(record(self), indent=1) + "\n")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        config = self.heads.config
        return {
            **self.options.numbers(),
            "data_sha256": self.data.sha256,
            "lm_head": config.lm_head_fingerprint,
        }

    def save_checkpoint(self) -> None:
        tensors = {}
        for name, parameter in self.heads.named_parameters():
            tensors[name] = parameter.detach()
            tensors.update({f"{name}.{key}": self.optimizer.state[parameter][key] for key in OPTIMIZER_STATE})
        progress = {"step": self.step, "seconds": self.seconds, "best": self.best, "curve": self.curve}
        partial = self.options.output / (CHECKPOINT_FILE + ".partial")
        save_file(
            tensors, partial, {"identity": json.dumps(self.identity()), "progress": json.dumps(progress)}
        )
        partial.replace(
            self.options.output / CHECKPOINT_FILE
        )  # a kill leaves the old checkpoint or the new one

    def load_checkpoint(self) -> bool:
        file = self.options.output / CHECKPOINT_FILE
        if not file.exists():
            return False
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        found = json.loads(metadata["identity"])
        for key, expected in self.identity().items():
            if found.get(key) != expected:
                raise ValueError(
                    f"train: {key} must be {found.get(key)} to continue {CHECKPOINT_FILE} of the output,"
                    f" got {expected}; remove the file or choose another output folder"
                )
        tensors = load_file(file, device=str(self.device))
        for name, parameter in self.heads.named_parameters():
            parameter.data.copy_(tensors[name])
            self.optimizer.state[parameter] = {key: tensors[f"{name}.{key}"] for key in OPTIMIZER_STATE}
        for key, value in json.loads(metadata["progress"]).items():
            setattr(self, key, value)
        return True
