"""Training LARP's tokenizer of clips along with its prior (arXiv 2410.21264, sections 3.2 to 3.4).

Weights are those of hywang66/LARP: models/loss.py, cfgs/larp_tokenizer.yaml and scripts/*_reproduce.sh (8aaed63), for
clips in [-1, 1]. What differs: LeCam's weight counts once (the release multiplies by it twice); the discriminator's
read-out is our own (`varkit.training.clip_discriminator`); random numbers are keyed by clip.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.interfaces import Losses
from varkit.layers.code_usage import CodeUsage
from varkit.rng import Draw, Rng
from varkit.tokenizers.larp import LARPTokenizer
from varkit.tokenizers.larp_prior import own_token_ratio
from varkit.tokenizers.multiscale_vq import Quantized
from varkit.training.clip_discriminator import ClipDiscriminator, PerFrame, shown_frames
from varkit.training.losses import AdversarialLoss, lecam_loss, tokenizer_loss
from varkit.training.objectives.vq_tokenizer import VQConfig, VQTraining
from varkit.training.optim import OptimConfig

CLIPS = True
SHOWN = 8
"""Frames of a clip in a row of the sample sheet."""


@config
class Config(VQConfig):
    """A LARP tokenizer and its losses. The defaults are the release's, for clips in [-1, 1]."""

    name: Literal["larp"] = "larp"
    model: str = "larp_tokenizer_l_long"  # a registered LARP tokenizer with a prior
    l1_weight: float = 0.5  # 1 for clips in [0, 1]
    l2_weight: float = 0.0
    quantizer_weight: float = 0.1
    prior_weight: float = 0.06  # of the prior's cross entropy; 0: no prior is trained
    prior_lr_scale: float = 50.0  # the prior's learning rate over that of the rest
    own_tokens: float = 0.5  # how often, at most, the prior's second round reads its own token
    own_tokens_peak: float = 0.3  # share of the steps at which it is as often
    adversarial_weight: float = 0.3
    adversarial_start: float = 0.0
    adversarial_loss: AdversarialLoss = "non_saturating"
    adaptive: bool = False
    adaptive_low: float = 0.0
    discriminator: Literal["transformer", "patch"] = "transformer"  # type: ignore[assignment]  # of clips; of frames
    discriminator_size: tuple[int, int, int] = (512, 12, 8)  # of transformer: width, layers, heads
    discriminator_every: int = 5  # steps between updates of the discriminator
    discriminator_optim: OptimConfig = OptimConfig(
        lr=3e-5, betas=(0.5, 0.9), weight_decay=0.0, clip=0.0, schedule="cos", final=0.01
    )
    target_noise: float = 0.15  # how far the discriminator's targets lie from certain, |normal| times this, at most 2
    lecam_weight: float = 1e-6
    restart_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_weight < 0 or not self.prior_lr_scale > 0:
            raise ConfigError("objective: prior_weight must not be negative, prior_lr_scale must be above 0")
        if not 0 <= self.own_tokens <= 1 or not 0 < self.own_tokens_peak <= 1:
            raise ConfigError("objective.own_tokens is a share, 0 to 1, own_tokens_peak one above 0")
        if self.discriminator_every < 1 or not 0 <= self.target_noise < 0.25:
            raise ConfigError("objective: discriminator_every counts from 1, target_noise is 0 to below 0.25")
        if self.adversarial_loss == "hinge" and self.target_noise:
            raise ConfigError("objective.target_noise is for non_saturating and vanilla: set it to 0 for hinge")
        if self.augment:
            raise ConfigError("objective.augment changes single images, not clips: leave it out")


class Training(VQTraining):
    """Owns the tokenizer with its prior, the discriminator, and the perceptual net, which sees frames."""

    kind = LARPTokenizer
    last_layer = "final_layer.linear.weight"

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__(config, classes)
        self.num_frames = self.tokenizer.num_frames
        self.columns = min(SHOWN, self.num_frames)
        self.tokenizer.lr_scales = {"prior_model": config.prior_lr_scale}
        if self.perceptual:
            self.freeze("lpips", PerFrame(self.frozen("lpips")))

    def _build(self) -> LARPTokenizer:
        model: LARPTokenizer = super()._build()
        if self.config.prior_weight and model.prior_model is None:
            raise ConfigError(
                f"{self.config.init_from or self.config.model} has no prior: set objective.prior_weight=0, or take a "
                f"model with prior_size"
            )
        self.counter = CodeUsage(1, model.config.codebook_size)
        return model

    def held(self) -> tuple[str, ...]:
        unused = self.tokenizer.prior_model is not None and not self.config.prior_weight
        return ("prior_model.*",) if unused else ()

    @property
    def usage(self) -> CodeUsage:
        return self.counter

    @property
    def codes(self) -> Tensor:
        return cast(Tensor, self.tokenizer.quantize.embedding.weight)

    def _discriminator(self) -> nn.Module:
        if self.config.discriminator == "patch":
            return PerFrame(super()._discriminator())
        c = self.tokenizer.config
        clip = (self.tokenizer.num_frames, *self.image_size)
        return ClipDiscriminator(clip, (c.frame_patch, c.patch, c.patch), self.config.discriminator_size)

    def phases(self, step: int) -> list[str]:
        due = self.adversarial(step) and step % self.config.discriminator_every == 0
        return ["main", "discriminator"] if due else ["main"]

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator counts in this step, whether or not it learns."""
        return self.discriminator is not None and step >= self.config.adversarial_start * self.max_steps

    # ---- losses -------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        clips = batch["images"]
        if phase == "discriminator":
            return self._judge(clips, self.fakes.pop(0), rng)
        reconstruction, middle, log = self.reconstruct(clips, step, rng)
        c = self.config
        losses = tokenizer_loss(
            clips,
            reconstruction,
            middle,
            self.tokenizer.get_parameter(self.last_layer),
            l1_weight=c.l1_weight,
            l2_weight=c.l2_weight,
            perceptual=self.frozen("lpips") if self.perceptual else None,
            perceptual_weight=c.perceptual_weight,
            discriminator=self.discriminator if self.adversarial(step) else None,
            adversarial_weight=c.adversarial_weight,
            adversarial_loss=c.adversarial_loss,
            adaptive=c.adaptive,
            adaptive_low=c.adaptive_low,
            adaptive_high=c.adaptive_high,
            adaptive_eps=self.adaptive_eps,
        )
        if "discriminator" in self.phases(step):
            self.fakes.append(reconstruction.detach())
        del losses["quantizer"]
        return {**losses, **log}

    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        self.begin(step)
        c, out = self.config, self.tokenizer(images, rng)
        code = out.code
        self.coded.append(Quantized(code.vectors, code.loss, [code.ids], [code.features.flatten(0, 1)]))
        self.counter.record_usage([code.ids])
        middle, log = c.quantizer_weight * code.loss, {"quantizer": code.loss}
        if c.prior_weight:
            ratio = own_token_ratio(step, self.max_steps, c.own_tokens, c.own_tokens_peak)
            log["prior"] = self.tokenizer.prior_rounds(code, ratio, rng).loss
            middle = middle + c.prior_weight * log["prior"]
        return out.clips, middle, log

    def _judge(self, real: Tensor, fake: Tensor, rng: Rng) -> Losses:
        assert self.discriminator is not None
        c, count = self.config, len(real)
        real, fake = self.discriminator(torch.cat([real, fake])).chunk(2)  # one batch for BatchNorm
        loss = noisy_loss(real, fake, c.adversarial_loss, self._targets(rng, count).to(real.device))
        means = {"logit_real": real.float().mean(), "logit_fake": fake.float().mean()}
        if not c.lecam_weight:
            return {"loss": loss, **means}
        lecam = lecam_loss(real, fake, *self.logit_averages)
        self.judged.append(torch.stack([*means.values()]).detach())
        return {"loss": loss + c.lecam_weight * lecam, **means, "lecam": lecam}

    def _targets(self, rng: Rng, count: int) -> Tensor:
        """(2, B): how far the targets of real and of reconstructed clips lie from 1 and 0."""
        noise = rng.normal(torch.arange(2), Draw.TARGET_NOISE)[:count].T
        return self.config.target_noise * noise.abs().clamp(max=2)

    # ---- what is shown ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """Of the nearest codes: PSNR, mean square, and how well the prior predicts true tokens from true ones."""
        clips = batch["images"]
        code = self.tokenizer.quantize(self.tokenizer.features(clips), None)
        back = self.tokenizer.decode(code.ids).float()
        mse = F.mse_loss(back, clips, reduction="none").flatten(1).mean(1)
        numbers = {"psnr": (10 * torch.log10(4 / mse)).mean(), "l2": mse.mean()}
        if self.tokenizer.prior_model is not None:
            numbers["prior"] = self.tokenizer.prior_rounds(code, 0.0, rng).loss
        return numbers

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Of four clips some frames in a row, and their reconstructions in the row below."""
        clips = batch["images"][:4]
        return shown_frames(torch.stack([clips, self._back(clips)], 1).flatten(0, 1), self.columns)


def noisy_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss, off: Tensor) -> Tensor:
    """A discriminator's cross entropy with targets 1 - off[0] for real clips, off[1] for others; hinge has no targets.

    Args: real, fake: (N, ...) logits of B clips, N a multiple of B.   off: (2, B), 0 to below 0.5.
    """
    real, fake = real.float().flatten(1), fake.float().flatten(1)
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    each = off.repeat_interleave(len(real) // off.shape[1], 1)[..., None]  # 2 N 1
    cross_entropy = F.binary_cross_entropy_with_logits
    first = cross_entropy(real, (1 - each[0]).expand_as(real))
    return 0.5 * (first + cross_entropy(fake, each[1].expand_as(fake)))
