"""The training loop: batches, optimizer, measurements. `train.train` is what users call."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_cosine_schedule_with_warmup

from ..drafting.heads import CerberusHeads, fingerprint, input_matrix, output_matrix
from ..io.heads_file import write_heads
from .answers import Answers
from .batch import Batch, Reach, cut, reach_of
from .checkpoint import load_checkpoint, save_checkpoint
from .distill import context_states, counted, distillation, head_states
from .estimate import state_estimate
from .held_out import BEST_SIZE, MAX_LINES, HeldOut
from .hidden_cache import STORED_BYTES, HiddenCache
from .options import SEGMENT, TrainOptions
from .positions import Corpus, Positions
from .processes import Processes
from .record import write_record
from .start import start_heads
from .states import StateSource
from .windows import Drawn, Windows

INDEX_BYTES = 5 * 8  # of a row, for its token, its line, its place in it, how many follow, and that it is an answer's


class Trainer:
    """One run: heads, optimizer, how far it got. The model is only read.

    Products are computed in the model's dtype; parameters, their gradients, the optimizer and the loss are float32.
    Among several processes each does a share of every step; the main one alone measures, writes and tells.
    made: how the answers came about, for the record.
    """

    def __init__(
        self, model: nn.Module, answers: Answers, options: TrainOptions, processes: Processes, made: dict[str, Any]
    ) -> None:
        self.model, self.options, self.processes, self.made = model, options, processes, made
        lm_head, self.embeddings = output_matrix(model).detach(), input_matrix(model).detach()
        self.device, self.dtype, (vocab_size, size) = lm_head.device, lm_head.dtype, lm_head.shape
        per_step = options.batch // SEGMENT
        if per_step < processes.count:
            least = SEGMENT * processes.count
            raise ValueError(f"train: batch must be >= {least} for {processes.count} processes, got {options.batch}")

        self.corpus = corpus = Corpus(answers, options.context_layer)
        lines = len(answers.lines)
        first_held = lines - min(max(1, round(lines * options.held_out)), MAX_LINES)
        self.training = corpus.pieces(0, first_held)
        row_bytes = size * STORED_BYTES + INDEX_BYTES
        self.windows = Windows(self.training, options.memory * 1e9, row_bytes, per_step, options.seed)
        limit = None if options.cache_size is None else options.cache_size * 1e9
        cache = HiddenCache(options.cache, limit, size, corpus) if options.cache else None
        if cache:
            processes.from_main(lambda: cache.check(model))
        self.source = StateSource(model, corpus, cache, processes)
        self.held = self.source.alone(corpus.pieces(first_held, lines)) if processes.main else None

        self.tokens, self.held_tokens = corpus.answer_ids(0, first_held), corpus.answer_ids(first_held, lines)
        scale = processes.from_main(lambda: rms(self.held.hidden) if self.held else 0.0)
        self.heads = start_heads(model, options, self.tokens, scale)
        ids = torch.arange(vocab_size) if self.heads.draft_vocab is None else self.heads.draft_vocab
        self.projection = lm_head if self.heads.draft_vocab is None else lm_head[ids]
        self.draft_index = torch.full((vocab_size,), -1)
        self.draft_index[ids.cpu()] = torch.arange(len(ids))
        groups = [{"params": list(self.heads.parameters()), "initial_lr": options.lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        self.held_out: HeldOut | None = None
        if self.held:
            greedy = [line.temperature == 0 for line in answers.lines]
            self.held_out = HeldOut(self.held, greedy, lm_head, self.projection, self.draft_index)

        self.window: tuple[tuple[int, int], Positions] | None = None  # the epoch's and its number; what is in memory
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.curve: list[dict[str, Any]] = []
        self.identity = self._identity()

    def run(self) -> None:
        """Trains to the last step, from the output folder's checkpoint if it has one."""
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        progress = self.processes.from_main(self._load)
        if progress is not None:
            if not self.processes.main and not self._load():
                raise ValueError("train: output must be a folder that every process can read")
            for key, value in progress.items():
                setattr(self, key, value)
            self.processes.say(f"resuming at step {self.step} of {options.steps}")
        if self.step < options.steps and not self.stale():
            state_estimate(self)
            self.loop()

    def loop(self) -> None:
        options, losses = self.options, list[float]()
        started = time.perf_counter() - self.seconds
        # The rate is zero at its steps 0 and `steps + 1`: neither is one of ours.
        schedule = get_cosine_schedule_with_warmup(self.optimizer, options.warmup, options.steps + 1, last_epoch=self.step)
        with tqdm(
            total=options.steps, initial=self.step, desc="training", unit="step", disable=not self.processes.main
        ) as bar:
            for drawn in islice(self.windows.drawn(self.step), options.steps - self.step):
                losses.append(self.train_step(drawn))
                schedule.step()
                best = {"best": f"{self.best:.2f} tokens a step"} if self.best > 0 else {}
                bar.set_postfix(loss=f"{losses[-1]:.3f}", **best, refresh=False)
                bar.update()
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    self.seconds = time.perf_counter() - started
                    if self.processes.main:
                        self.measure(sum(losses) / len(losses))
                    losses.clear()
                    if self.processes.from_main(self.stale):
                        self.processes.say(
                            f"stopped at step {self.step}: no better heads in {options.patience} measurements"
                        )
                        break

    def train_step(self, drawn: Drawn) -> float:
        """One step of AdamW; returns the loss before it."""
        options, count = self.options, self.processes.count
        data = self.positions(drawn)
        # Every process knows the whole batch's positions, so that its share is weighed as in the whole.
        rows = data.answers[drawn.starts[:, None] + torch.arange(SEGMENT)]
        counts = counted(data.left[rows], options.heads)
        loss = self.backward(self.cut(data, drawn.starts[self.processes.index :: count]), counts)
        if count > 1:
            self._sum_over_processes(loss)
        norm = nn.utils.clip_grad_norm_(self.heads.parameters(), options.clip)
        for what, value in (("loss", loss), ("the gradient's norm", norm)):
            if not value.isfinite():
                raise FloatingPointError(
                    f"train: {what} must be finite, got {value.item()} at step {self.step};"
                    f" a lower lr than {options.lr} may help"
                )
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Sets the gradient of the heads' parameters, and returns the loss (). counts: see `distillation`."""
        hidden = batch.hidden[:, :SEGMENT].flatten(0, 1).float() if batch.reach is None else self.read(batch.reach)
        states = self.states(hidden, batch.tokens.flatten())
        teacher = (batch.hidden[:, 1:].to(self.dtype) @ self.projection.T).float()
        loss, gradient = distillation(
            states.detach(), self.projection, teacher, batch.left, counts.to(self.device), self.options.head_decay
        )
        self.optimizer.zero_grad()
        states.backward(gradient)
        return loss

    def states(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Final states (K, N, D) float32 where the states `hidden` (N, D) produced `tokens` (N,).

        hidden: as they have come through the context layer, if there is one.
        """
        hidden = hidden.to(self.device, torch.float32)
        anchor = hidden if self.heads.anchor_scale is None else self.anchor(tokens)
        return head_states(hidden, anchor, self.heads.weight, self.heads.bias, self.dtype)

    def anchor(self, tokens: Tensor) -> Tensor:
        """(N, D) float32"""
        assert self.heads.anchor_scale is not None
        return self.embeddings[tokens.to(self.device)].float() * self.heads.anchor_scale

    def read(self, reach: Reach) -> Tensor:
        """What the heads read at the positions of the reach, (N, D) float32."""
        assert self.heads.context is not None
        return context_states(self.heads.context, reach, self.anchor(reach.tokens), self.dtype)

    @torch.no_grad()
    def read_all(self, data: Positions) -> Tensor:
        """What the heads read at the answers' tokens, (A, D): the hidden states, through the context layer if any."""
        if not self.options.context_layer:
            return data.hidden[data.answers]
        lines = data.lines[data.answers].unique_consecutive(return_counts=True)[1].tolist()
        rows = data.answers.split(lines)
        return torch.cat([self.read(reach_of(data, line[None], self.device)).cpu() for line in rows])

    def cut(self, data: Positions, starts: Tensor) -> Batch:
        return cut(data, starts, self.options.heads, self.device, self.options.context_layer)

    def positions(self, drawn: Drawn) -> Positions:
        """The window that a step draws from, out of memory if it is the one that is there. Collective where it is not."""
        key = (0 if self.windows.whole else drawn.epoch, drawn.number)
        if self.window is None or self.window[0] != key:
            self.window = None  # frees the memory for the next one
            self.window = (key, self.source.together(drawn.window))
        return self.window[1]

    def measure(self, loss: float) -> None:
        """Adds a point to the curve, saves the heads if they are the best so far, writes checkpoint and record."""
        assert self.held is not None and self.held_out is not None  # the main process has them
        result = self.held_out.measure(self.read_all(self.held), self.states, self.options.heads)
        point = {
            "step": self.step,
            "loss": round(loss, 4),
            "seconds": round(self.seconds),
            "top1": result.top1,
            "top3": result.top3,
            "tokens_per_step": result.tokens_per_step,
        }
        self.curve.append(point)
        top1 = " ".join(f"{share:.3f}" for share in result.top1)
        tokens = ", ".join(f"{value:.2f} ({size})" for size, value in result.tokens_per_step.items())
        tqdm.write(f"step {self.step}: loss {loss:.3f}, top-1 {top1}, tokens a step (tree of) {tokens}")
        if result.tokens_per_step[BEST_SIZE] > self.best:
            self.best = result.tokens_per_step[BEST_SIZE]
            self.heads.config.paths = [list(path) for path in result.paths]
            self.heads.config.accuracy = result.accuracy
            self.save_heads()
        progress = {"step": self.step, "seconds": self.seconds, "best": self.best, "curve": self.curve}
        save_checkpoint(self.options.output, self.heads, self.optimizer, self.identity, progress)
        write_record(self)

    def save_heads(self) -> None:
        """In bfloat16, into the output folder."""
        kept = CerberusHeads(self.heads.config)
        kept.load_state_dict(self.heads.state_dict())
        write_heads(self.options.output, kept.to(torch.bfloat16).state_dict(), asdict(self.heads.config))

    def stale(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        values = [point["tokens_per_step"][BEST_SIZE] for point in self.curve]
        return 0 < self.options.patience <= len(values) - 1 - (values.index(max(values)) if values else 0)

    def _sum_over_processes(self, loss: Tensor) -> None:
        """In place: loss and gradients of the whole batch, from those of the shares; one message."""
        parts = [loss, *(parameter.grad for parameter in self.heads.parameters() if parameter.grad is not None)]
        flat = torch.cat([part.flatten() for part in parts])
        self.processes.sum(flat)
        for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def _load(self) -> dict[str, Any] | None:
        return load_checkpoint(self.options.output, self.heads, self.optimizer, self.identity)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        return {
            **self.options.training_numbers(),
            "memory": None if self.windows.whole else self.options.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data_sha256": self.corpus.answers.sha256,
            "lm_head": self.heads.config.lm_head_fingerprint,
            "start": fingerprint(self.heads.parameters()),
        }


def rms(rows: Tensor) -> float:
    return rows.float().square().mean().sqrt().item()
