"""Training FlexTok on a frozen autoencoder: rectified flow with nested dropout (arXiv 2502.13967, section 3).

No training code was released. The paper also aligns an early decoder layer with DINOv2 features (REPA); that is not
here. What is logged besides the loss: it for images that kept few tokens, many, and no condition at all.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit import registry
from varkit.config import ConfigError, config
from varkit.interfaces import Losses, Objective
from varkit.rng import Rng
from varkit.tokenizers.flextok import FlexTok
from varkit.tokenizers.kl_vae import KLVAE


@config
class Config:
    """A FlexTok and the autoencoder that it stands on. How it learns is in the model's own arguments."""

    name: Literal["flextok"] = "flextok"
    model: str = "flextok_d12_d12"  # a registered FlexTok
    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    vae: str | None = None  # a folder or hub repository, of varkit or of diffusers' AutoencoderKL
    init_from: str | None = None  # a FlexTok's folder to start from, with its own autoencoder

    def __post_init__(self) -> None:
        if (self.vae is None) == (self.init_from is None):
            raise ConfigError("objective: give vae, the autoencoder of a new FlexTok, or init_from; not both")


class Training(Objective):
    """Owns the tokenizer; its autoencoder is frozen."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = self._build().train()
        self.image_size = self.tokenizer.image_size
        self.max_steps = 1

    def _build(self) -> FlexTok:
        if self.config.init_from is not None:
            loaded = FlexTok.from_pretrained(self.config.init_from, **self.config.model_overrides)
            model = FlexTok(**{k: v for k, v in loaded.config.items() if not k.startswith("_")})  # as if new: what is
            model.load_state_dict(loaded.state_dict())  # trained and what is fixed
        else:
            vae = KLVAE.from_pretrained(self.config.vae)
            vae_config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
            model = registry.create_model(
                self.config.model, **{**self.config.model_overrides, "vae_config": vae_config}
            )
            if not isinstance(model, FlexTok):
                raise ConfigError(f"objective.model must be a FlexTok; {self.config.model} is no such model")
            model.vae.load_state_dict(vae.state_dict())
        return model

    def trained(self, phase: str) -> nn.Module:
        return self.tokenizer

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        return self.tokenizer(batch["images"], rng)

    def lengths(self) -> list[int]:
        """The shortest, a middle one and the longest."""
        powers = self.tokenizer.powers_of_two()
        return sorted({powers[0], powers[len(powers) // 2], powers[-1]})

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """PSNR at a few lengths, and the rectified-flow loss."""
        images = batch["images"]
        numbers: Losses = dict(self.tokenizer(images, rng))
        tokens = self.tokenizer.encode(images)
        for length in self.lengths():
            decoded = self.tokenizer.decode(tokens, lengths=length).float()
            mse = F.mse_loss(decoded, images, reduction="none").mean((1, 2, 3))
            numbers[f"psnr_{length}"] = (10 * torch.log10(4 / mse)).mean()
        return numbers

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """A row of originals, then their reconstructions from 1, 2, 4, ... tokens, a row a length."""
        images = batch["images"][:8]
        tokens = self.tokenizer.encode(images)
        rows = [self.tokenizer.decode(tokens, lengths=n).float() for n in self.tokenizer.powers_of_two()]
        return torch.cat([images, *rows])

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
