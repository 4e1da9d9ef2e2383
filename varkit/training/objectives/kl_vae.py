"""Training an autoencoder with a Gaussian posterior, the first stage of latent diffusion (arXiv 2112.10752).

Loss: reconstruction from a sample of the posterior (L1, L2, LPIPS, a patch discriminator) and a little of the
posterior's divergence from a standard normal. The scale of the latents is measured on the way and written into the
exported configuration, so that what generators see has a standard deviation of 1.
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
from varkit.metrics.lpips import SMALLEST_SIDE, find_lpips
from varkit.pipelines.auto import open_tokenizer
from varkit.rng import Rng
from varkit.tokenizers.kl_vae import KLVAE
from varkit.training.losses import (
    AdversarialLoss,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from varkit.training.optim import OptimConfig
from varkit.training.sync import place, summed


@config
class Config:
    """A KL autoencoder and its losses. Each is a mean over pixels, or over latents."""

    name: Literal["kl-vae"] = "kl-vae"
    model: str = "kl_vae_f8"  # a registered tokenizer with continuous latents
    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    init_from: str | None = None  # a folder, hub repository or released file, of varkit or of diffusers' AutoencoderKL
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    kl_weight: float = 1e-6  # of the mean divergence of a latent number from a standard normal, in nats
    perceptual_weight: float = 1.0  # LPIPS (VGG)
    lpips: str = "auto"  # auto, none, or a folder with the two weight files
    adversarial_weight: float = 0.5  # 0: no discriminator at all
    adversarial_start: float = 0.2  # share of the steps after which it counts
    adversarial_loss: AdversarialLoss = "hinge"
    discriminator_width: int = 64
    discriminator_layers: int = 3
    discriminator_optim: OptimConfig = OptimConfig(lr=3e-4, betas=(0.5, 0.9), weight_decay=0.0005, clip=10.0)
    scale_decay: float = 0.99  # of the moving average of the latents' variance

    def __post_init__(self) -> None:
        if min(self.perceptual_weight, self.adversarial_weight, self.kl_weight) < 0:
            raise ConfigError("objective: loss weights must not be negative")


class Training(Objective):
    """Owns the autoencoder, the discriminator with its optimiser phase, and the perceptual net."""

    variance: Tensor  # moving average, of all latents alike; 0 before the first step

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = self._build()
        self.image_size = self.tokenizer.image_size
        self.register_buffer("variance", torch.zeros(()))
        self.discriminator = None
        if config.adversarial_weight:
            smallest = 3 * 2**config.discriminator_layers
            if min(self.image_size) < smallest:
                raise ConfigError(
                    f"objective.discriminator_layers {config.discriminator_layers} needs images of at least {smallest} "
                    f"pixels a side; these have {min(self.image_size)}. Use fewer layers, or adversarial_weight=0"
                )
            self.discriminator = PatchDiscriminator(3, config.discriminator_width, config.discriminator_layers)
        self.perceptual = False
        if config.perceptual_weight and min(self.image_size) >= SMALLEST_SIDE:
            lpips = find_lpips(config.lpips)
            if lpips is not None:
                self.freeze("lpips", lpips)
                self.perceptual = True
        self.fakes: list[Tensor] = []  # reconstructions of this step, for the discriminator's turn
        self.seen: list[Tensor] = []  # variances of this step's latents
        self.max_steps = 1

    def _build(self) -> KLVAE:
        start = self.config.init_from
        if start is not None:
            model = open_tokenizer(start).train().requires_grad_(True)
        else:
            model = registry.create_model(self.config.model, **self.config.model_overrides)
        if not isinstance(model, KLVAE):
            name = f"model must be a KL autoencoder; {self.config.model}" if start is None else f"init_from: {start}"
            raise ConfigError(f"objective.{name} is no KL autoencoder but a {type(model).__name__}")
        return model

    def phases(self, step: int) -> list[str]:
        adversarial = self.discriminator is not None and step >= self.config.adversarial_start * self.max_steps
        return ["main", "discriminator"] if adversarial else ["main"]

    def all_phases(self) -> list[str]:
        return ["main", "discriminator"] if self.discriminator is not None else ["main"]

    def trained(self, phase: str) -> nn.Module:
        if phase == "main":
            return self.tokenizer
        assert self.discriminator is not None
        return self.discriminator

    def optim(self, phase: str, default: OptimConfig) -> OptimConfig:
        return default if phase == "main" else self.config.discriminator_optim

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        images = batch["images"]
        if phase == "discriminator":
            assert self.discriminator is not None
            real, fake = self.discriminator(torch.cat([images, self.fakes.pop(0)])).chunk(2)
            loss = discriminator_loss(self.config.adversarial_loss, real, fake)
            return {"loss": loss, "logit_real": real.float().mean(), "logit_fake": fake.float().mean()}
        c = self.config
        reconstruction, posterior = self.tokenizer(images, rng)
        mean, std = posterior.mean.float(), posterior.std.float()
        self.seen.append((mean.detach().var() + std.detach().square().mean()).detach())
        l1, l2 = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
        losses: Losses = {"l1": l1, "l2": l2, "kl": posterior.kl().mean() / mean[0].numel()}
        nll = c.l1_weight * l1 + c.l2_weight * l2
        if self.perceptual:
            losses["lpips"] = self.frozen("lpips")(reconstruction, images).mean()
            nll = nll + c.perceptual_weight * losses["lpips"]
        loss = nll + c.kl_weight * losses["kl"]
        if "discriminator" in self.phases(step):
            assert self.discriminator is not None
            losses["adversarial"] = generator_loss(self.discriminator(reconstruction))
            weight = torch.ones((), device=images.device)
            if torch.is_grad_enabled():
                last = self.tokenizer.vae.decoder.conv_out.weight
                weight = adaptive_weight(nll, losses["adversarial"], last)
            losses["adaptive_weight"] = weight
            loss = loss + c.adversarial_weight * weight * losses["adversarial"]
            self.fakes.append(reconstruction.detach())
        return {"loss": loss, **losses}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        variance = summed(torch.stack(self.seen).mean()) / place()[1]
        self.variance.copy_(variance if step == 0 else torch.lerp(variance, self.variance, self.config.scale_decay))
        self.discard_step()

    def discard_step(self) -> None:
        self.seen.clear()
        self.fakes.clear()

    def statistics(self) -> dict[str, float]:
        return {"latent_std": float(self.variance.sqrt())}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        images = batch["images"]
        mse = F.mse_loss(self._reconstruct(images), images, reduction="none").mean((1, 2, 3))
        return {"psnr": (10 * torch.log10(4 / mse)).mean(), "l2": mse.mean()}

    def _reconstruct(self, images: Tensor) -> Tensor:
        return self.tokenizer.decode(self.tokenizer.encode(images)).float()

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Originals and, below each row of them, their reconstructions."""
        images = batch["images"][:16]
        pairs = zip(images.split(8), self._reconstruct(images).split(8), strict=True)
        return torch.cat([row for pair in pairs for row in pair])

    def export(self, folder: Path) -> None:
        if self.variance > 0:
            scale = float(self.variance.rsqrt())
            self.tokenizer.register_to_config(scaling_factor=scale, latents_mean=None, latents_std=None)
        self.tokenizer.save_pretrained(folder)
