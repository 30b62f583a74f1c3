"""The training loop: steps, measurements, checkpoints. `train.train` is what users call."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_cosine_schedule_with_warmup

from ..drafting.heads import CerberusHeads
from ..io.heads_file import write_heads
from .checkpoint import load_checkpoint, save_checkpoint
from .estimate import state_estimate
from .held_out import Measurement, described, merit
from .record import write_record
from .run import Run


class Trainer(Run):
    """A run from its first step, or from its last checkpoint, to its end."""

    stored_dtype = torch.bfloat16
    result: Measurement  # the last one

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        return {
            **self.options.training_numbers(),
            "memory": None if self.windows.whole else self.options.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data_sha256": self.corpus.answers.sha256,
            "lm_head": self.heads.config.lm_head_fingerprint,
            "start": self.start,
        }

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
        schedule = get_cosine_schedule_with_warmup(
            self.optimizer, options.warmup, options.steps + 1, last_epoch=self.step
        )
        with tqdm(
            total=options.steps, initial=self.step, desc="training", unit="step", disable=not self.processes.main
        ) as bar:
            for drawn in islice(self.windows.drawn(self.step), options.steps - self.step):
                losses.append(self.train_step(drawn))
                schedule.step()
                best = {"best": f"{self.best:.2f} tokens per step"} if self.best > 0 else {}
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

    def measure(self, loss: float | None) -> None:
        """Adds a point to the curve, saves the heads if they are the best so far, writes checkpoint and record.

        loss: since the measurement before; None where there was no step.
        """
        trained = None if loss is None else round(loss, 4)
        point = {"step": self.step, "loss": trained, "seconds": round(self.seconds), **self.evaluate()}
        self.curve.append(point)
        tqdm.write(described(point))
        if merit(point) > self.best:
            self.best = merit(point)
            self.keep()
        progress = {"step": self.step, "seconds": self.seconds, "best": self.best, "curve": self.curve}
        save_checkpoint(self.options.output, self.heads, self.optimizer, self.identity, progress)
        write_record(self)

    def evaluate(self) -> dict[str, Any]:
        """What the heads are worth on held-out answers, for the curve."""
        self.result = self.held_out.measure(self.read_all(self.held), self.states, self.options.heads)
        found = {name: getattr(self.result, name) for name in ("top1", "top3", "tokens_per_step")}
        return found if self.heads.conditional is None else found | self.conditional_quality(self.places(self.held))

    def keep(self) -> None:
        """Of the last measurement."""
        self.heads.config.paths = [list(path) for path in self.result.paths]
        self.heads.config.accuracy = self.result.accuracy
        self.save_heads()

    def save_heads(self) -> None:
        """Into the output folder, as they were measured last."""
        kept = CerberusHeads(self.heads.config)
        kept.load_state_dict(self.heads.state_dict())
        if kept.conditional is not None:
            kept.conditional.keys.data *= self.curve[-1]["key_share"]
        write_heads(self.options.output, kept.to(self.stored_dtype).state_dict(), asdict(self.heads.config))

    def stale(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        values = [merit(point) for point in self.curve]
        return 0 < self.options.patience <= len(values) - 1 - (values.index(max(values)) if values else 0)

    def _load(self) -> dict[str, Any] | None:
        return load_checkpoint(self.options.output, self.heads, self.optimizer, self.identity)
