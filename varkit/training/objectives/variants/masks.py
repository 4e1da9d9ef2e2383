"""Which positions are masked, keyed by image, and what stands in their place.

Shapes: B images, L positions, C channels of an input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varkit.config import ConfigError
from varkit.interfaces import Generator, Tokenizer
from varkit.rng import Rng


def random_subset(rng: Rng, candidates: Tensor, counts: int | Tensor, kind: int) -> Tensor:
    """A mask (B, L) of `counts` of the candidates of each image, drawn without replacement.

    Args: candidates: (L,) bool.   counts: a number or (B,).   kind: of the draw.
    """
    u = rng.uniform(torch.arange(len(candidates)), kind)  # B L
    u = u.masked_fill(~candidates.to(u.device), 2.0)
    rank = u.argsort(dim=-1, stable=True).argsort(-1)
    counts = torch.as_tensor(counts, device=u.device).reshape(-1, 1)
    return (rank < counts) & candidates.to(u.device)


def groups_of(generator: Generator) -> Tensor:
    """(L,) int64: in which group of the generator's schedule each position is decided."""
    group = torch.empty(generator.layout.length, dtype=torch.int64)
    for k, positions in enumerate(generator.schedule()):
        group[positions.cpu()] = k
    return group


class MaskInput(nn.Module):
    """What a generator reads in place of a masked input: a learned vector, or, of one that reads ids, its `mask_id`.

    Args: section: of the configuration, named in errors.
    Raises: ConfigError when the generator reads ids and has none to spare.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, section: str) -> None:
        super().__init__()
        ids = torch.zeros(1, tokenizer.layout.length, dtype=torch.int64, device=tokenizer.codebook.device)
        read = tokenizer.embed(ids)
        if read.is_floating_point():
            self.vector: nn.Parameter | None = nn.Parameter(0.02 * torch.randn(read.shape[-1]))  # C
        elif generator.mask_id is not None:
            self.vector, self.id = None, generator.mask_id
        else:
            raise ConfigError(
                f"objective.{section} masks inputs, but {type(generator).__name__} reads ids and has no mask_id; "
                f"leave {section} out, or take a generator whose vocabulary has a mask"
            )

    def forward(self, inputs: Tensor, masked: Tensor) -> Tensor:
        """`inputs` (B, L, C) or (B, L), with the mask where `masked` (B, L) is true."""
        masked = masked.to(inputs.device)
        if self.vector is None:
            return inputs.masked_fill(masked, self.id)
        return torch.where(masked[..., None], self.vector.to(inputs.dtype), inputs)
