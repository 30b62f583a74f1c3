"""The training loop: batches, optimizer, measurements. `train.train` is what users call."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.heads import CerberusHeads, input_matrix, output_matrix
from ..io.files import write_tensors
from ..io.heads_file import write_heads
from .answers import Answers
from .batch import Batch, cut
from .checkpoint import digest, load_checkpoint, save_checkpoint
from .context import Reach, context_states, reach_of
from .distill import counted, distillation, head_states, learning_rate
from .estimate import state_estimate
from .held_out import BEST_SIZE, MAX_LINES, HeldOut
from .hidden_cache import STORED_BYTES, HiddenCache
from .options import SEGMENT, TrainOptions
from .positions import Positions, answer_ids, pieces
from .processes import Processes
from .record import write_record
from .start import start_heads
from .states import StateSource
from .windows import Windows

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
        self.model, self.answers, self.options, self.processes, self.made = model, answers, options, processes, made
        lm_head, self.embeddings = output_matrix(model).detach(), input_matrix(model).detach()
        self.device, self.dtype, (vocab_size, size) = lm_head.device, lm_head.dtype, lm_head.shape
        if options.batch // SEGMENT < processes.count:
            least = SEGMENT * processes.count
            raise ValueError(f"train: batch must be >= {least} for {processes.count} processes, got {options.batch}")

        lines = len(answers.lines)
        first_held = lines - min(max(1, round(lines * options.held_out)), MAX_LINES)
        context = options.context_layer
        self.training = pieces(answers.lines, 0, first_held, context)
        held = pieces(answers.lines, first_held, lines, context)
        per_step, row_bytes = options.batch // SEGMENT, size * STORED_BYTES + INDEX_BYTES
        self.windows = Windows(self.training, options.memory * 1e9, row_bytes, per_step, options.seed)
        limit = None if options.cache_size is None else options.cache_size * 1e9
        cache = HiddenCache(options.cache, limit, size, answers, context) if options.cache else None
        if cache:
            processes.from_main(lambda: cache.check(model))
        self.source = StateSource(model, answers, cache, processes, context)
        self.held = self.source.alone(held) if processes.main else None

        self.tokens, self.held_tokens = answer_ids(answers.lines[:first_held]), answer_ids(answers.lines[first_held:])
        scale = processes.from_main(lambda: rms(self.held.hidden) if self.held else 0.0)
        self.heads = start_heads(model, options, self.tokens, scale)
        self.start = digest(self.heads.state_dict())
        ids = torch.arange(vocab_size) if self.heads.draft_vocab is None else self.heads.draft_vocab
        self.projection = lm_head if self.heads.draft_vocab is None else lm_head[ids]
        self.draft_index = torch.full((vocab_size,), -1)
        self.draft_index[ids.cpu()] = torch.arange(len(ids))
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=options.lr, weight_decay=0.0)
        self.held_out: HeldOut | None = None
        if self.held:
            greedy = [line.temperature == 0 for line in answers.lines]
            self.held_out = HeldOut(self.held, greedy, lm_head, self.projection, self.draft_index)

        self.window: tuple[tuple[int, int], Positions] | None = None  # the epoch's and its number; what is in memory
        self.step = 0
        self.seconds = 0.0
        self.best = -1.0
        self.curve: list[dict[str, Any]] = []

    def run(self) -> None:
        """Trains to the last step, from the output folder's checkpoint if it has one."""
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        progress = self.processes.from_main(
            lambda: load_checkpoint(options.output, self.heads, self.optimizer, self.identity())
        )
        if progress is not None:
            if not self.processes.main and not load_checkpoint(
                options.output, self.heads, self.optimizer, self.identity()
            ):
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
        with tqdm(
            total=options.steps, initial=self.step, desc="training", unit="step", disable=not self.processes.main
        ) as bar:
            while self.step < options.steps:
                losses.append(self.train_step())
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

    def train_step(self) -> float:
        """One step of AdamW; returns the loss before it."""
        options, count = self.options, self.processes.count
        epoch, number, index = self.windows.locate(self.step)
        data = self.positions(epoch, number)
        starts = self.windows.starts(epoch, number, index)
        # Every process knows the whole batch's positions, so that its share is weighed as in the whole.
        drawn = data.answers[starts[:, None] + torch.arange(SEGMENT)]
        counts = counted(data.left[drawn], options.heads)
        loss = self.backward(self.cut(data, starts[self.processes.index :: count]), counts)
        if count > 1:
            self.sum_over_processes(loss)
        norm = nn.utils.clip_grad_norm_(self.heads.parameters(), options.clip)
        value = loss.item()
        if not torch.isfinite(loss + norm):
            self.abort(value, norm.item(), self.cut(data, starts))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, options.steps, options.warmup, options.lr)
        self.optimizer.step()
        self.step += 1
        return value

    def backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Sets the gradient of the heads' parameters, and returns the loss (). counts: see `distillation`."""
        options = self.options
        hidden = batch.hidden[:, :SEGMENT].flatten(0, 1).float()
        if batch.reach is not None:
            hidden = self.read(batch.reach)
        states = self.states(hidden, batch.tokens.flatten())
        teacher = (batch.hidden[:, 1:].to(self.dtype) @ self.projection.T).float()
        loss, gradient = distillation(
            states.detach(), self.projection, teacher, batch.left, counts.to(self.device), options.head_decay
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

    def positions(self, epoch: int, number: int) -> Positions:
        """A window of the data, from memory if it is the one that is there. Collective where it is not."""
        key = (0 if self.windows.whole else epoch, number)
        if self.window is None or self.window[0] != key:
            self.window = None  # frees the memory for the next one
            self.window = (key, self.source.together(self.windows.epoch(epoch)[number]))
        return self.window[1]

    def sum_over_processes(self, loss: Tensor) -> None:
        """In place: loss and gradients of the whole batch, from those of the shares; one message."""
        gradients = [parameter.grad for parameter in self.heads.parameters() if parameter.grad is not None]
        parts = [loss, *gradients]
        flat = torch.cat([part.flatten() for part in parts])
        self.processes.sum(flat)
        for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def abort(self, loss: float, norm: float, batch: Batch) -> NoReturn:
        """Saves the batch and the parameters that it failed with, and raises."""
        file = self.options.output / f"failed-step-{self.step}.safetensors"
        if self.processes.main:
            tensors = {"hidden": batch.hidden, "tokens": batch.tokens, "left": batch.left, **self.heads.state_dict()}
            write_tensors(file, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        what, value = ("loss", loss) if loss - loss != 0 else ("the gradient's norm", norm)
        raise FloatingPointError(
            f"train: {what} must be finite, got {value} at step {self.step}, whose batch is in {file};"
            f" a lower lr than {self.options.lr} may help"
        )

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
        save_checkpoint(self.options.output, self.heads, self.optimizer, self.identity(), progress)
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

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        config = self.heads.config
        return {
            **self.options.training_numbers(),
            "memory": None if self.windows.whole else self.options.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data_sha256": self.answers.sha256,
            "lm_head": config.lm_head_fingerprint,
            "start": self.start,
        }


def rms(rows: Tensor) -> float:
    return rows.float().square().mean().sqrt().item()
