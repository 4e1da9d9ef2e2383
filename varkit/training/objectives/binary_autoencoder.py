"""Training ELM's binary autoencoder (Xuantong Liu et al., arXiv 2410.16257, section 3.2).

Losses and weights are those of Pepper-lll/LMforImageGeneration: bae/ (c2f29f0), for images in [-1, 1]. The loss that
pushes probabilities away from 1/2 is an argument of the model (model_overrides.code_weight), 0 as released.

There is no codebook that could collapse, but a bit may be always on or always off. What is logged instead of usage is
the entropy of each bit over images and positions: 1 where it is on half of the time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from varkit.config import config
from varkit.interfaces import Losses
from varkit.rng import Rng
from varkit.tokenizers.binary_autoencoder import BinaryAutoencoder
from varkit.training.objectives.reconstruction import ReconstructionConfig, ReconstructionTraining
from varkit.training.sync import place, summed

SHARE_DECAY = 0.99
"""Of the moving average of how often each bit is 1."""


@config
class Config(ReconstructionConfig):
    """A binary autoencoder and its losses."""

    name: Literal["bae"] = "bae"
    model: str = "bae_2_8"  # a registered binary autoencoder
    drawn: bool = True  # bits are drawn with their probabilities; false: cut at the model's threshold
    l1_weight: float = 0.5  # 1 for images in [0, 1]
    l2_weight: float = 0.0
    adversarial_weight: float = 1.0
    adversarial_start: float = 0.03
    adaptive_low: float = 0.0
    adaptive_high: float = 1.0


class Training(ReconstructionTraining):
    """See `ReconstructionTraining`."""

    kind = BinaryAutoencoder
    bit_share: Tensor  # K: moving average of how often each bit is 1

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__(config, classes)
        self.register_buffer("bit_share", torch.full((self.tokenizer.config.bits,), 0.5))
        self.bits: list[Tensor] = []  # K each: shares of this step's micro-batches

    def _build(self) -> Any:
        model = super()._build()
        self.last_layer = f"generator.blocks.{len(model.generator.blocks) - 1}.weight"
        return model

    def _freeze(self) -> list[str]:
        lines = super()._freeze()
        self.tokenizer.generator.logsigma.requires_grad_(False)  # read by nothing
        return lines

    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        reconstruction, quantized = self.tokenizer(images, rng if self.config.drawn else None)
        self.bits.append(quantized.bits.detach().float().mean((0, 2, 3)))
        return reconstruction, quantized.loss, {"code": quantized.code_loss}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        super().after_step(step, rng)
        share = summed(torch.stack(self.bits).mean(0)) / place()[1]
        self.bit_share.copy_(share if step == 0 else torch.lerp(share, self.bit_share, SHARE_DECAY))
        self.bits.clear()

    def discard_step(self) -> None:
        super().discard_step()
        self.bits.clear()

    def statistics(self) -> dict[str, float]:
        """Entropy of the bits over images and positions, 0 to 1: their mean, and that of the least used."""
        p = self.bit_share
        entropy = (torch.special.entr(p) + torch.special.entr(1 - p)) / torch.log(torch.tensor(2.0))
        return {"bits/entropy": float(entropy.mean()), "bits/least": float(entropy.min())}
