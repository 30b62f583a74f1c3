"""Several processes that train together, as `accelerate launch` or `torchrun` starts them, or the one there is."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")
# The others wait while the main one measures, or while a slow one finishes its answers. A process that died is noticed
# by the launcher, which ends the rest.
TIMEOUT = timedelta(hours=2)


class Processes:
    """This process (`index`) among `count` of them. A context: joins the others, and leaves them at its end.

    Every method but `say` is collective where there are several: all of them call it, in the same order.
    """

    index, count, joined = 0, 1, False

    def __enter__(self) -> Processes:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Both, since hidden states are sent from memory and gradients from the device: accelerate has only one.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
            self.joined = True
        if dist.is_initialized():
            self.index, self.count = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.joined:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this one writes the files and shows the progress."""
        return self.index == 0

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def sum(self, tensor: Tensor) -> None:
        """In place: the sum over the processes, the same bits in each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """In place: the contiguous CPU tensor that `source` has."""
        if self.count > 1:
            dist.broadcast(tensor.view(torch.uint8), source)  # bytes: every dtype passes

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns, or raises, in the main process; it is called in no other one."""
        if self.count == 1:
            return make()
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = make()
            except (OSError, ValueError) as error:
                result[1] = error
        dist.broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order, in the main process; elsewhere nothing."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.gather_object(value, values if self.main else None)
        return values if self.main else []
