"""One run of the training: what a step reads and computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..drafting.conditional import rms
from ..drafting.dynamic_policy import MAX_DRAFTS
from ..drafting.heads import fingerprint, input_matrix, output_matrix
from .answers import Answers
from .batch import Batch, Reach, cut, reach_of
from .distill import Offer, context_states, counted, distillation, head_states, offer_of
from .held_out import MAX_LINES, HeldOut
from .options import SEGMENT, TrainOptions
from .places import Places, conditional_loss, conditional_quality, joined, places_of, weighed
from .positions import Corpus, Positions
from .processes import Processes
from .start import parameter_groups, start_heads
from .states import STORED_BYTES, StateSource
from .windows import Drawn, Loaded, Windows

INDEX_BYTES = 5 * 8  # of a row, for its token, its line, its place in it, how many follow, and that it is an answer's
KEY_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PIECE = 32  # segments whose logits, or drafts, are in memory at a time


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
        self.windows = Windows(corpus.training, options.memory * 1e9, self.row_bytes(size), per_step, options.seed)
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
        self.drafts = min(MAX_DRAFTS, len(ids))
        self.scales = rms(self.projection), rms(self.embeddings)
        groups = parameter_groups(self.heads, options.lr, options.only)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        self.loaded = Loaded(self.windows, self.source.together)
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.curve: list[dict[str, Any]] = []

    def row_bytes(self, size: int) -> int:
        """Of a row of a window, in memory. size: D."""
        return size * STORED_BYTES + INDEX_BYTES

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @cached_property
    def held_out(self) -> HeldOut:
        """What measures the heads; only the main process needs it."""
        greedy = [line.temperature == 0 for line in self.corpus.lines]
        lm_head = output_matrix(self.model).detach()
        return HeldOut(self.held, greedy, lm_head, self.projection, self.draft_index)

    def train_step(self, drawn: Drawn) -> float:
        """One step of AdamW; returns the loss before it."""
        options = self.options
        loss = self.gradient(drawn)
        if self.processes.count > 1:
            self._sum_over_processes(loss)
        # Each group by itself: heads learn the same with conditional drafts and without.
        norms = [nn.utils.clip_grad_norm_(group["params"], options.clip) for group in self.optimizer.param_groups]
        for what, value in (("loss", loss), *(("the gradient's norm", norm) for norm in norms)):
            if not value.isfinite():
                raise FloatingPointError(
                    f"train: {what} must be finite, got {value.item()} at step {self.step};"
                    f" a lower lr than {options.lr} may help"
                )
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def gradient(self, drawn: Drawn) -> Tensor:
        """Sets the gradient of this process's share of the step, and returns its loss ()."""
        data = self.positions(drawn)
        # Every process knows the whole batch's positions, so that its share is weighed as in the whole.
        rows = data.answers[drawn.starts[:, None] + torch.arange(SEGMENT)]
        counts = counted(data.left[rows], self.options.heads)
        return self.backward(self.cut(data, drawn.starts[self.processes.index :: self.processes.count]), counts)

    def backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Sets the gradient of the heads' parameters, and returns the loss (). counts: see `distillation`.

        Conditional drafts learn from what the heads offer at this step; the heads do not learn from them.
        """
        hidden = batch.hidden[:, :SEGMENT].flatten(0, 1).float() if batch.reach is None else self.read(batch.reach)
        states = self.states(hidden, batch.tokens[:, :SEGMENT].flatten())
        teacher, counts, offers = self.teacher(batch), counts.to(self.device), list[Offer]()
        loss, gradient = distillation(
            states.detach(), self.projection, teacher, batch.left, counts, self.options.head_decay,
            self.drafts, None if self.heads.conditional is None else offers,
        )  # fmt: skip
        self.optimizer.zero_grad()
        states.backward(gradient)
        if self.heads.conditional is not None:
            places = places_of(offers[1:], teacher, batch.tokens, batch.left, self.draft_index)
            conditional = conditional_loss(self.weighed(places)[0], places, counts[1:])
            conditional.backward()
            loss = loss + conditional.detach()
        return loss

    def teacher(self, batch: Batch) -> Tensor:
        """(S, SEGMENT + K - 1, Vd) float32: see `distillation`."""
        return (batch.hidden[:, 1:].to(self.dtype) @ self.projection.T).float()

    def weighed(self, places: Places, shares: Sequence[float] = (1.0,)) -> list[Tensor]:
        """See `places.weighed`."""
        assert self.heads.conditional is not None
        return weighed(self.heads.conditional, places, self.projection, self.embeddings, self.scales, shares)

    @torch.no_grad()
    def conditional_quality(self, places: Places) -> dict[str, Any]:
        """For the curve. places: of held-out answers.

        From few answers keys learn to be too certain: they count as much as is best for the held-out ones.
        """
        pieces = (places.rows(rows) for rows in torch.arange(len(places.usable)).split(PIECE * SEGMENT))
        found = [self.weighed(Places(*(part.to(self.device) for part in piece)), KEY_SHARES) for piece in pieces]
        results = [conditional_quality(torch.cat(logprobs).cpu(), places) for logprobs in zip(*found, strict=True)]
        (loss, top1), share = min(zip(results, KEY_SHARES, strict=True), key=lambda result: result[0][0])
        return {"conditional_loss": loss, "conditional_top1": top1, "key_share": share}

    def probe(self) -> None:
        """The work of a step, but for the optimizer's, with held-out answers; for an estimate of its time."""
        segments = self.options.batch // SEGMENT // self.processes.count
        starts = torch.arange(segments) * SEGMENT % max(1, len(self.held.answers) - SEGMENT)
        batch = self.cut(self.held, starts)
        self.backward(batch, counted(batch.left, self.options.heads))

    def step_memory(self) -> dict[str, int]:
        """Bytes that a step needs for a moment, by what they hold."""
        rows = self.options.batch // self.processes.count
        teacher_rows = rows // SEGMENT * (SEGMENT + self.options.heads - 1)
        return {"logits": 4 * len(self.projection) * (3 * teacher_rows + 3 * rows)}

    def more_seconds(self) -> float | None:
        """What the run needs beside its steps and hidden states; None: nothing."""
        return None

    @torch.no_grad()
    def places(self, data: Positions) -> Places:
        """Of all answer tokens of the data, on the CPU."""
        count, found = len(data.answers), list[Places]()
        read = self.read_all(data)
        for starts in torch.arange(0, count, SEGMENT).split(PIECE):
            batch = cut(data, starts, self.options.heads, self.device)
            rows = (starts[:, None] + torch.arange(SEGMENT)).flatten().clamp(max=count - 1)
            logits = self.states(read[rows], batch.tokens[:, :SEGMENT].flatten())[1:].to(self.dtype) @ self.projection.T
            offers = [offer_of(of_head, of_head.logsumexp(-1), self.drafts) for of_head in logits.float()]
            made = places_of(offers, self.teacher(batch), batch.tokens, batch.left, self.draft_index)
            found.append(Places(*(part.cpu() for part in made)))
        return joined(found).rows(torch.arange(count))

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
        return self.loaded.of(drawn)

    def _sum_over_processes(self, loss: Tensor) -> None:
        """In place: loss and gradients of the whole batch, from those of the shares; one message."""
        parts = [loss, *(parameter.grad for parameter in self.trained if parameter.grad is not None)]
        flat = parameters_to_vector(parts)
        self.processes.sum(flat)
        vector_to_parameters(flat, parts)
