"""The categorical predictive: logits over a codebook, guided, filtered and sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.interfaces import Predictive, Processor
from varkit.rng import Draw, Rng
from varkit.rng import pick as pick  # where others look for it


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weight: float | Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of each position times `weight`, summed over positions, averaged over the batch.

    Args:
        logits: (B, n, V), or (B, n, G, V) of factorised codes, whose losses are averaged over G.
        target: (B, n) or (B, n, G) ids.   weight: a number, (n,) or (B, n).
    """
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), label_smoothing=label_smoothing, reduction="none")
    losses = losses.view_as(target)
    return ((losses.mean(-1) if losses.dim() == 3 else losses) * weight).sum(1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over positions of logsumexp(logits)^2, (..., V) -> a scalar: it keeps logits from drifting (PaLM)."""
    return logits.float().logsumexp(-1).square().mean()


class Categorical(Predictive):
    """Logits (B, n, V) float32, or (B, n, G, V) of factorised codes; with guidance pending, also those of the
    unconditional branch.

    Attributes: hidden: (R, ., C) what the output head read, at all entries read in this call, if a generator keeps it.
    """

    hidden: Tensor | None = None

    def __init__(self, logits: Tensor, null_logits: Tensor | None = None) -> None:
        self.logits, self.null_logits = logits, null_logits

    def guide(self, scale: float | Tensor) -> Categorical:
        """uncond + scale * (cond - uncond), `scale` (n,) or (B, n) if not a number.

        Raises: ValueError when there is no unconditional branch.
        """
        if isinstance(scale, Tensor):
            scale = scale.to(self.logits).view(*scale.shape, *[1] * (self.logits.dim() - 2))  # (B) n 1, or (B) n 1 1
        if self.null_logits is None:
            if isinstance(scale, Tensor) or scale != 1:
                raise ValueError("guidance needs an unconditional branch: pass null= to start()")
            return self
        return Categorical(torch.lerp(self.null_logits, self.logits, scale))

    def process(self, processors: Sequence[Processor]) -> Categorical:
        logits = self.logits
        for processor in processors:
            logits = processor(logits)
        return Categorical(logits)

    def probs(self, processors: Sequence[Processor] = ()) -> Tensor:
        """(B, n, V) or (B, n, G, V) float32, summing to 1."""
        return self.process(processors).logits.softmax(-1)

    def sample(self, rng: Rng, positions: Tensor, processors: Sequence[Processor] = ()) -> Tensor:
        """(B, n) int64, or (B, n, G)."""
        groups = self.logits.shape[2] if self.logits.dim() == 4 else None
        return pick(self.probs(processors), rng.uniform(positions, Draw.TOKEN, count=groups))
