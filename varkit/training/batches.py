"""Which images make up which step: a pure function of seed and step, so resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

Entry = tuple[int, int]
"""An image's index, and the number of the sample in the whole run, which keys its random numbers."""


class StepBatches(Sampler[list[Entry]]):
    """Micro-batches of one process, step by step, from a given step on.

    The run is one endless list of samples: epoch after epoch, each shuffled anew. Step s takes samples
    [s * batch, (s + 1) * batch); micro-batches and processes share them out in order, so the step is the same
    set of images however it is divided.

    Raises: ValueError when the batch cannot be divided evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        start: int,
        stop: int,
        seed: int,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.micro, rest = divmod(batch_size, accumulation * processes)
        if rest or self.micro == 0:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared evenly by {processes} processes with {accumulation} "
                f"micro-batches each; make it a multiple of {processes * accumulation}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop
        self.accumulation, self.process, self.processes = accumulation, process, processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def index(self, sample: int) -> int:
        """Which image is sample number `sample` of the run."""
        epoch, place = divmod(sample, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        return int(self._order[place])

    def __iter__(self) -> Iterator[list[Entry]]:
        for step in range(self.start, self.stop):
            for part in range(self.accumulation):
                first = step * self.batch_size + (part * self.processes + self.process) * self.micro
                yield [(self.index(s), s) for s in range(first, first + self.micro)]
