"""Training FlexTok on a frozen autoencoder: rectified flow with nested dropout (arXiv 2502.13967, section 3).

No training code was released. The paper also aligns an early decoder layer with DINOv2 features: section `repa`.
What is logged besides the loss: the flow's for images that kept few tokens, many, and no condition at all.
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
from varkit.training.objectives.variants.arra import FrozenEncoder
from varkit.training.objectives.variants.combined import Together
from varkit.training.objectives.variants.repa import PatchAlignment, Repa


@config
class Config:
    """A FlexTok and the autoencoder that it stands on. How it learns is in the model's own arguments."""

    name: Literal["flextok"] = "flextok"
    model: str = "flextok_d12_d12"  # a registered FlexTok
    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    vae: str | None = None  # a folder or hub repository, of varkit or of diffusers' AutoencoderKL
    init_from: str | None = None  # a FlexTok's folder to start from, with its own autoencoder
    init: Literal["normal", "mup"] = "normal"  # of a new FlexTok: one over the root of the inputs, or as the release
    mup_base_width: int = 768  # width at which mup is plain Xavier
    repa: Repa | None = None  # alignment of the decoder's patches with an image encoder's; None: off

    def __post_init__(self) -> None:
        if self.init == "mup" and (self.init_from is not None or self.mup_base_width < 1):
            raise ConfigError("objective.init=mup is for a new FlexTok (no init_from), with a mup_base_width above 0")
        if (self.vae is None) == (self.init_from is None):
            raise ConfigError("objective: give vae, the autoencoder of a new FlexTok, or init_from; not both")


class Training(Objective):
    """Owns the tokenizer; its autoencoder is frozen."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = self._build().train()
        self.image_size = self.tokenizer.image_size
        self.repa = None if config.repa is None else self._alignment(config.repa)
        self.max_steps = 1

    def _alignment(self, repa: Repa) -> PatchAlignment:
        """Raises: ConfigError where the encoder is not to be had, or the decoder has no such block."""
        depth, width = self.tokenizer.config.decoder_depth, self.tokenizer.config.decoder_width
        if repa.layer >= depth:
            raise ConfigError(
                f"objective.repa.layer must be in 0 .. {depth - 1}, the blocks of the decoder; got {repa.layer}"
            )
        encoder = FrozenEncoder(repa.encoder, repa.weights, "repa", repa.size)
        self.freeze("encoder", encoder)
        return PatchAlignment(width, encoder.map_dim, repa.projector_depth)

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
            if self.config.init == "mup":
                model.init_weights_mup(self.config.mup_base_width)
        return model

    def trained(self, phase: str) -> nn.Module:
        return self.tokenizer if self.repa is None else Together(self.tokenizer, variants=self.repa)

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        images, repa = batch["images"], self.config.repa
        if self.repa is None or repa is None:
            return self.tokenizer(images, rng)
        losses = self.tokenizer(images, rng, hidden_layer=repa.layer)
        losses["repa"] = self.repa(losses.pop("hidden"), self.frozen("encoder").maps(images))
        return {**losses, "loss": losses["loss"] + repa.weight * losses["repa"]}

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
