"""One run of the training: what a step reads and computes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..drafting.heads import fingerprint, input_matrix, output_matrix
from .answers import Answers
from .batch import Batch, Reach, cut, reach_of
from .distill import context_states, counted, distillation, head_states
from .held_out import MAX_LINES, HeldOut
from .options import SEGMENT, TrainOptions
from .positions import Corpus, Positions
from .processes import Processes
from .start import start_heads
from .states import STORED_BYTES, StateSource
from .windows import Drawn, Windows

INDEX_BYTES = 5 * 8  # of a row, for its token, its line, its place in it, how many follow, and that it is an answer's


class Run:
    """Data, heads, optimizer, how far it got. The model is only read.

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
            minimum = SEGMENT * processes.count
            raise ValueError(f"train: batch must be >= {minimum} for {processes.count} processes, got {options.batch}")

        lines = len(answers.lines)
        held = min(max(1, round(lines * options.held_out)), MAX_LINES)
        self.corpus = corpus = Corpus(answers, held, options.context_layer)
        row_bytes = size * STORED_BYTES + INDEX_BYTES
        self.windows = Windows(corpus.training, options.memory * 1e9, row_bytes, per_step, options.seed)
        limit = None if options.cache_size is None else options.cache_size * 1e9
        self.source = StateSource(model, corpus, processes, options.cache, limit)
        self.held = self.source.together(corpus.held)

        self.tokens = corpus.answer_ids(0, corpus.first_held)
        self.held_tokens = corpus.answer_ids(corpus.first_held, lines)
        # Of one process: others may round otherwise.
        scale = processes.from_main(lambda: self.held.hidden.float().square().mean().sqrt().item())
        self.heads = start_heads(model, options, self.tokens, scale)
        self.start = fingerprint(self.heads.parameters())
        ids = torch.arange(vocab_size) if self.heads.draft_vocab is None else self.heads.draft_vocab
        self.projection = lm_head if self.heads.draft_vocab is None else lm_head[ids]
        self.draft_index = torch.full((vocab_size,), -1)
        self.draft_index[ids.cpu()] = torch.arange(len(ids))
        groups = [{"params": list(self.heads.parameters()), "initial_lr": options.lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        self.window: tuple[tuple[int, int], Positions] | None = None  # the epoch's and its number; what is in memory
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.curve: list[dict[str, Any]] = []

    @cached_property
    def held_out(self) -> HeldOut:
        """What measures the heads; only the main process needs it."""
        greedy = [line.temperature == 0 for line in self.corpus.lines]
        lm_head = output_matrix(self.model).detach()
        return HeldOut(self.held, greedy, lm_head, self.projection, self.draft_index)

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
        """The window that a step draws from; collective where it is not yet in memory."""
        key = (0 if self.windows.whole else drawn.epoch, drawn.number)
        if self.window is None or self.window[0] != key:
            self.window = None  # frees the memory for the next one
            self.window = (key, self.source.together(drawn.window))
        return self.window[1]

    def _sum_over_processes(self, loss: Tensor) -> None:
        """In place: loss and gradients of the whole batch, from those of the shares; one message."""
        parts = [loss, *(parameter.grad for parameter in self.heads.parameters() if parameter.grad is not None)]
        flat = parameters_to_vector(parts)
        self.processes.sum(flat)
        vector_to_parameters(flat, parts)
