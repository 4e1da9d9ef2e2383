"""What training a tokenizer of images has in common, whatever lies in its middle: likeness to the image, a perceptual
distance, a discriminator.

What the middle adds to the loss, and what care it needs, is in the subclasses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit import registry
from varkit.config import ConfigError, config
from varkit.interfaces import Losses, Objective
from varkit.metrics.lpips import SMALLEST_SIDE, find_lpips
from varkit.pipelines.auto import open_tokenizer
from varkit.rng import Rng
from varkit.training import finetune
from varkit.training.augment import diff_augment
from varkit.training.losses import (
    AdversarialLoss,
    PatchDiscriminator,
    StyleDiscriminator,
    discriminator_loss,
    lecam_loss,
    tokenizer_loss,
)
from varkit.training.optim import OptimConfig
from varkit.training.sync import place, summed


@config
class ReconstructionConfig:
    """Keys of every such objective."""

    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    init_from: str | None = None  # a shipped model, a folder, a released checkpoint or its file to start from
    freeze: tuple[str, ...] = ()  # name patterns of the tokenizer's parameters that are not trained: encoder.*
    l1_weight: float = 0.2
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0  # LPIPS (VGG)
    lpips: str = "auto"  # auto, none, or a folder with the two weight files
    adversarial_weight: float = 0.4  # 0: no discriminator at all
    adversarial_start: float = 0.2  # share of the steps after which it counts
    adversarial_loss: AdversarialLoss = "hinge"
    adaptive: bool = True  # scale the adversarial term to the reconstruction's gradient
    adaptive_low: float = 0.015
    adaptive_high: float = 1e4
    discriminator: Literal["patch", "style"] = "patch"  # style: for square images of a power of two
    discriminator_width: int = 64  # of patch
    discriminator_layers: int = 3  # of patch
    discriminator_optim: OptimConfig = OptimConfig(lr=3e-4, betas=(0.5, 0.9), weight_decay=0.0005, clip=10.0)
    lecam_weight: float = 0.0  # keeps the discriminator's logits near their moving averages
    lecam_decay: float = 0.999  # of these averages
    augment: bool = False  # the discriminator sees images recoloured and moved at random (DiffAugment)

    def __post_init__(self) -> None:
        if min(self.perceptual_weight, self.adversarial_weight, self.lecam_weight) < 0:
            raise ConfigError("objective: loss weights must not be negative")


class ReconstructionTraining(Objective):
    """Owns the tokenizer, the discriminator with its optimiser phase, and the perceptual net."""

    kind: type[Any]
    """Class of the tokenizer."""
    released_arguments: frozenset[str] = frozenset()
    """Constructor arguments that may also change when a released file is opened."""
    last_layer = "decoder.conv_out.weight"
    """Name of the weight that makes the image, at which the adaptive weight compares gradients."""
    adaptive_eps = 1e-6
    logit_averages: Tensor  # 2, of LeCam: real images and reconstructions

    def __init__(self, config: Any, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = self._build()
        self.notes += self._freeze()
        self.image_size = self.tokenizer.image_size
        self.discriminator: nn.Module | None = None
        if config.adversarial_weight and self.compares_images():
            self.discriminator = self._discriminator()
            if config.lecam_weight:
                self.register_buffer("logit_averages", torch.zeros(2))
        self.perceptual = False
        if config.perceptual_weight and self.compares_images() and min(self.image_size) >= SMALLEST_SIDE:
            lpips = find_lpips(config.lpips)
            if lpips is not None:
                self.freeze("lpips", lpips)
                self.perceptual = True
        self.fakes: list[Tensor] = []  # reconstructions of this step, for the discriminator's turn
        self.judged: list[Tensor] = []  # mean logits of this step's micro-batches, for LeCam
        self.max_steps = 1

    # ---- what a subclass may say ------------------------------------------------------------------------------

    @abstractmethod
    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        """The reconstruction, not clamped; what the middle adds to the loss, weighted; its numbers for the log."""

    def compares_images(self) -> bool:
        """Whether the loss compares images; if not, there is neither discriminator nor perceptual net."""
        return True

    def compared(self, images: Tensor) -> Tensor:
        """Images that losses compare, (N, 3, H, W): of clips, (B, 3, T, H, W), all frames."""
        return images if images.dim() == 4 else images.transpose(1, 2).flatten(0, 1)

    def compared_rng(self, images: Tensor, rng: Rng) -> Rng:
        """Random numbers of each of them: frames of a clip share theirs."""
        return rng if images.dim() == 4 else rng[torch.arange(len(images)).repeat_interleave(images.shape[2])]

    def held(self) -> tuple[str, ...]:
        """Name patterns of what is not trained whatever `objective.freeze` says."""
        return ()

    # ---- set-up -------------------------------------------------------------------------------------------------

    def _discriminator(self) -> nn.Module:
        """Raises ConfigError where it does not go with the size of the images."""
        c, (height, width) = self.config, self.image_size
        if c.discriminator == "style":
            if height != width or height not in StyleDiscriminator.WIDTHS or height < 8:
                raise ConfigError(
                    f"objective.discriminator=style is for square images of a power of two, 8 to 1024; these are "
                    f"{height}x{width}. Use patch, or adversarial_weight=0"
                )
            return StyleDiscriminator(3, height)
        smallest = 3 * 2**c.discriminator_layers
        if min(height, width) < smallest:
            raise ConfigError(
                f"objective.discriminator_layers {c.discriminator_layers} needs images of at least {smallest} "
                f"pixels a side; these have {min(height, width)}. Use fewer layers, or adversarial_weight=0"
            )
        return PatchDiscriminator(3, c.discriminator_width, c.discriminator_layers)

    def _build(self) -> Any:
        source, overrides = self.config.init_from, self.config.model_overrides
        if source is None:
            fresh = registry.create_model(self.config.model, **overrides)
            if not isinstance(fresh, self.kind):
                raise ConfigError(
                    f"objective {self.config.name} trains a {self.kind.__name__}; objective.model {self.config.model} "
                    f"is a {type(fresh).__name__}"
                )
            return fresh
        free: frozenset[str] = getattr(self.kind, "free_arguments", frozenset())
        if source in registry.list_checkpoints() or Path(source).is_file():
            free |= self.released_arguments
        model = open_tokenizer(source, **{k: v for k, v in overrides.items() if k in free})
        if not isinstance(model, self.kind):
            raise ConfigError(
                f"objective {self.config.name} trains a {self.kind.__name__}; objective.init_from {source} holds a "
                f"{type(model).__name__}"
            )
        finetune.require_same(model, overrides, source)
        return model.float()

    def _freeze(self) -> list[str]:
        """Lines for the log. Raises ConfigError when something else in the configuration needs what is frozen."""
        tokenizer = self.tokenizer.train().requires_grad_(True)
        lines = finetune.freeze(tokenizer, (*self.held(), *self.config.freeze))
        adversarial = self.config.adversarial_weight and self.compares_images()
        if adversarial and self.config.adaptive and not tokenizer.get_parameter(self.last_layer).requires_grad:
            raise ConfigError(
                f"objective.adaptive weighs the adversarial loss by gradients of {self.last_layer}, which "
                f"objective.freeze holds; set objective.adaptive=false or adversarial_weight=0"
            )
        return lines

    # ---- what the loop asks ---------------------------------------------------------------------------------

    def phases(self, step: int) -> list[str]:
        adversarial = self.discriminator is not None and step >= self.config.adversarial_start * self.max_steps
        return ["main", "discriminator"] if adversarial else ["main"]

    def all_phases(self) -> list[str]:
        return ["main", "discriminator"] if self.discriminator is not None else ["main"]

    def trained(self, phase: str) -> nn.Module:
        if phase == "main":
            return cast(nn.Module, self.tokenizer)
        assert self.discriminator is not None
        return self.discriminator

    def optim(self, phase: str, default: OptimConfig) -> OptimConfig:
        return default if phase == "main" else self.config.discriminator_optim

    # ---- losses ---------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        images = batch["images"]
        if phase == "discriminator":
            return self._judge(self.compared(images), self.fakes.pop(0), self.compared_rng(images, rng))
        reconstruction, middle, log = self.reconstruct(images, step, rng)
        rng = self.compared_rng(images, rng)
        images, reconstruction = self.compared(images), self.compared(reconstruction)
        c, adversarial = self.config, "discriminator" in self.phases(step)
        losses = tokenizer_loss(
            images,
            reconstruction,
            middle,
            self.tokenizer.get_parameter(self.last_layer),
            l1_weight=c.l1_weight,
            l2_weight=c.l2_weight,
            perceptual=self.frozen("lpips") if self.perceptual else None,
            perceptual_weight=c.perceptual_weight,
            discriminator=self._seen(rng) if adversarial else None,
            adversarial_weight=c.adversarial_weight,
            adversarial_loss=c.adversarial_loss,
            adaptive=c.adaptive,
            adaptive_low=c.adaptive_low,
            adaptive_high=c.adaptive_high,
            adaptive_eps=self.adaptive_eps,
        )
        if adversarial:
            self.fakes.append(reconstruction.detach())
        del losses["quantizer"]
        return {**losses, **log}

    def _seen(self, rng: Rng) -> Callable[[Tensor], Tensor]:
        """The discriminator in the main phase: images -> logits."""
        assert self.discriminator is not None
        if not self.config.augment:
            return self.discriminator
        judge, change = self.discriminator, partial(diff_augment, rng=rng, step=0)
        return lambda images: judge(change(images))

    def _judge(self, real: Tensor, fake: Tensor, rng: Rng) -> Losses:
        """The discriminator's own loss."""
        assert self.discriminator is not None
        c = self.config
        if c.augment:
            real, fake = diff_augment(real, rng, step=1), diff_augment(fake, rng, step=2)
        real, fake = self.discriminator(torch.cat([real, fake])).chunk(2)  # one batch for BatchNorm
        loss = discriminator_loss(c.adversarial_loss, real, fake)
        means = {"logit_real": real.float().mean(), "logit_fake": fake.float().mean()}
        if not c.lecam_weight:
            return {"loss": loss, **means}
        lecam = lecam_loss(real, fake, *self.logit_averages)
        self.judged.append(torch.stack([*means.values()]).detach())
        return {"loss": loss + c.lecam_weight * lecam, **means, "lecam": lecam}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        self.fakes.clear()
        if self.judged:
            means = summed(torch.stack(self.judged).mean(0)) / place()[1]
            self.logit_averages.lerp_(means, 1 - self.config.lecam_decay)
            self.judged.clear()

    def discard_step(self) -> None:
        self.fakes.clear()
        self.judged.clear()
        for module in self.modules():  # its running statistics, used by nobody in training, saw the bad batch
            if isinstance(module, nn.BatchNorm2d) and not bool(module.state_dict()["running_var"].isfinite().all()):
                module.reset_running_stats()

    # ---- what is shown --------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        images = batch["images"]
        back = self.compared(self._back(images))
        mse = F.mse_loss(back, self.compared(images), reduction="none").mean((1, 2, 3))
        return {"psnr": (10 * torch.log10(4 / mse)).mean(), "l2": mse.mean()}

    def _back(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.tokenizer.decode(self.tokenizer.encode(images)).float())

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Originals and, below each row of them, their reconstructions."""
        images = batch["images"][:16]
        pairs = zip(images.split(8), self._back(images).split(8), strict=True)
        return torch.cat([row for pair in pairs for row in pair])

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
