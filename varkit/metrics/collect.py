"""Features of a set: read, run through the network, kept or pooled; on one process or on several.

Each process takes one run of consecutive images, so the merged statistics do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varkit.metrics.fid import FeatureStatistics
from varkit.metrics.sets import ImageSet

Network = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""uint8 images (B, 3, H, W) or clips (B, T, H, W, 3), names of outputs -> output (B, D) by name."""


@dataclass
class Wanted:
    """What is to be collected of each output.

    statistics: output -> settings of `FeatureStatistics`.   rows: outputs of which single rows are kept.
    kept: positions (among the images collected) of the rows to keep; None: all.
    pictures: positions of the images to keep.
    """

    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: set[str] = field(default_factory=set)
    kept: Sequence[int] | None = None
    pictures: Sequence[int] = ()

    @property
    def outputs(self) -> list[str]:
        return sorted(set(self.statistics) | self.rows)


@dataclass
class Collected:
    """rows: output -> (n, D) float32 on the CPU, in order.   pictures: position -> uint8 (3, H, W)."""

    num: int = 0
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    pictures: dict[int, Tensor] = field(default_factory=dict)

    def merge(self, other: Collected) -> None:
        """Add what the next process saw."""
        self.num += other.num
        for name, statistics in other.statistics.items():
            if name in self.statistics:
                self.statistics[name].merge(statistics)
            else:
                self.statistics[name] = statistics
        for name, rows in other.rows.items():
            self.rows[name] = torch.cat([self.rows[name], rows]) if name in self.rows else rows
        self.pictures |= other.pictures


@torch.no_grad()
def collect(
    network: Network,
    images: ImageSet,
    indices: Sequence[int],
    wanted: Wanted,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = False,
    what: str = "features",
    process: tuple[int, int] = (0, 1),
) -> Collected:
    """Run a set through a network.

    Args:
        indices: images of the set, in this order.   process: number of this process, and how many there are.
        progress: draw a bar on standard error.   what: what the bar calls it.
    Returns: what this process saw.
    Raises: ValueError for features that are not finite, naming the images.
    """
    rank, world = process
    start, stop = rank * len(indices) // world, (rank + 1) * len(indices) // world
    keep = None if wanted.kept is None else torch.zeros(len(indices), dtype=torch.bool)
    if keep is not None:
        keep[torch.as_tensor(wanted.kept, dtype=torch.int64)] = True
    pictures = set(wanted.pictures)
    result, rows = Collected(), {name: list[Tensor]() for name in wanted.rows}
    position = start
    from tqdm import tqdm

    with tqdm(total=stop - start, unit="image", desc=what, disable=not (progress and rank == 0)) as bar:
        for batch in images.batches(indices[start:stop], batch_size):
            found = {k: v.detach().cpu() for k, v in network(batch.to(device), wanted.outputs).items()}
            _require_finite(found, images, indices[position : position + len(batch)])
            for name, settings in wanted.statistics.items():
                if name not in result.statistics:
                    result.statistics[name] = FeatureStatistics(found[name].shape[1], **settings)
                result.statistics[name].update(found[name])
            for name in wanted.rows:
                chosen = found[name] if keep is None else found[name][keep[position : position + len(batch)]]
                rows[name].append(chosen.float())
            for i in pictures.intersection(range(position, position + len(batch))):
                result.pictures[i] = batch[i - position].clone()
            position += len(batch)
            bar.update(len(batch))
    result.num = position - start
    result.rows = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    return result


def _require_finite(found: Mapping[str, Tensor], images: ImageSet, indices: Sequence[int]) -> None:
    for name, values in found.items():
        bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            named = ", ".join(images.title(indices[i]) for i in bad[:5])
            raise ValueError(f"{images.source}: {name} of {len(bad)} images are NaN or infinite ({named})")


def gathered(own: Collected) -> Collected:
    """What all processes saw, in order of their numbers; on one process, what it saw itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    first: Collected = everyone[0]
    for other in everyone[1:]:
        first.merge(other)
    return first


def process() -> tuple[int, int]:
    """Number of this process and how many there are, as `accelerate launch` or torchrun started them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
