"""MEAP: mask a few inputs, keep next-token prediction (ICML 2025, arXiv 2502.07490).

Source: scitix/MEAP (0f5e837): MEAP-Pretain/pretrained/meap_1b.py, MEAP-SFT/MEAP-SFT.py. The paper is on language.
What differs for images: every image has positions of its own, unless `shared`; the group that reads no tokens (VAR's
first scale) is never masked; a generator that reads vectors (VAR) gets a learned vector instead of a mask id.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.rng import Draw, Rng
from varkit.training.objectives.variants.masks import random_subset


@config
class InputMasking:
    """Masked inputs; targets and loss stay."""

    ratio: float = 0.15  # share of the inputs that is masked; 0: none
    shared: bool = False  # one set of positions for all images of a step, as released
    seed_cycle: int = 51  # shared: after so many steps the same sets come again, as released
    keep_last: bool = True  # never mask the last input

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"objective.input_masking.ratio must be in [0, 1); got {self.ratio}")
        if self.seed_cycle < 1:
            raise ConfigError(f"objective.input_masking.seed_cycle must be at least 1; got {self.seed_cycle}")


def mask_count(length: int, ratio: float, minimum: int = 1) -> int:
    """How many of `length` positions are masked."""
    return max(minimum, int(length * ratio)) if ratio else 0


def shared_positions(
    length: int,
    ratio: float,
    step: int,
    *,
    seed_base: int = 50,
    seed_cycle: int = 51,
    minimum: int = 1,
    keep_last: bool = True,
) -> Tensor:
    """The release's positions (n,) of a step, the same for every row; Python's own random numbers."""
    count = mask_count(length, ratio, minimum)
    drawn = random.Random(seed_base + step % seed_cycle).sample(range(length - keep_last), count)
    return torch.tensor(drawn, dtype=torch.int64)


def masked_inputs(options: InputMasking, free: Tensor, rng: Rng, step: int) -> Tensor:
    """Which inputs are masked, (B, L) bool.

    Args: free: (L,) bool, the inputs that are tokens and may be masked.
    """
    length = int(free.sum())
    if not options.ratio or length <= options.keep_last:
        return torch.zeros(len(rng), len(free), dtype=torch.bool)
    candidates = free.clone()
    if options.shared:
        drawn = shared_positions(
            length, options.ratio, step, seed_cycle=options.seed_cycle, keep_last=options.keep_last
        )
        masked = torch.zeros_like(free)
        masked[free.nonzero()[drawn, 0]] = True
        return masked.expand(len(rng), -1)
    if options.keep_last:
        candidates[free.nonzero()[-1]] = False
    return random_subset(rng, candidates, mask_count(length, options.ratio), Draw.INPUT_MASK)


def pretraining_pair(tokens: Tensor, positions: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L + 1) -> masked inputs and untouched targets, (B, L) each.   positions: (n,), of the inputs."""
    inputs = tokens[:, :-1].clone()
    inputs[:, positions] = mask_id
    return inputs, tokens[:, 1:]


def finetuning_copy(
    sequence: Tensor,
    source_length: int,
    ratio: float,
    *,
    mask_id: int,
    eos_id: int,
    seed: int,
    minimum: int = 1,
    min_target_length: int = 50,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The masked copy that the release adds to each fine-tuning sample; None when its target part is short.

    Args: sequence: (n,) ids, a source of `source_length` and then the target.
    Returns: inputs and labels (n + 1,), with an end token that has no label; masked positions of the sequence, in the
        order drawn. Labels stand at masked positions only, not yet shifted.
    """
    length = len(sequence) - source_length
    if length <= min_target_length:
        return None
    drawn = random.Random(seed).sample(range(source_length, len(sequence)), mask_count(length, ratio, minimum))
    positions = torch.tensor(drawn, dtype=torch.int64)
    inputs = torch.cat([sequence, sequence.new_tensor([eos_id])])
    labels = torch.full_like(inputs, ignore_index)
    labels[positions] = inputs[positions]
    inputs[positions] = mask_id
    return inputs, labels, positions
