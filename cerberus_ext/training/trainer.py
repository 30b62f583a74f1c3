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
from .held_out import BEST_SIZE
from .record import write_record
from .run import Run


class Trainer(Run):
    """A run from its first step, or from its last checkpoint, to its end."""

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

    def measure(self, loss: float) -> None:
        """Adds a point to the curve, saves the heads if they are the best so far, writes checkpoint and record."""
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
        sizes, values = ", ".join(result.tokens_per_step), " ".join(f"{n:.2f}" for n in result.tokens_per_step.values())
        tqdm.write(
            f"step {self.step}: loss {loss:.3f}; held out: top-1 of heads 1 to {len(result.top1)}: {top1};"
            f" tokens per step with trees of {sizes} nodes: {values}"
        )
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

    def _load(self) -> dict[str, Any] | None:
        return load_checkpoint(self.options.output, self.heads, self.optimizer, self.identity)
