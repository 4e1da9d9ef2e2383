"""What training a VQ tokenizer has in common, of one scale or several: losses, discriminator, care of the codes.

Dead codes are restarted from what was coded in the step, and usage and perplexity are logged per scale: codebook
collapse is what users of the released trainers report.
"""

from __future__ import annotations

from dataclasses import field
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
from varkit.rng import Draw, Rng
from varkit.tokenizers.multiscale_vq import Quantized
from varkit.training import finetune
from varkit.training.losses import (
    AdversarialLoss,
    PatchDiscriminator,
    StyleDiscriminator,
    discriminator_loss,
    tokenizer_loss,
)
from varkit.training.optim import OptimConfig
from varkit.training.sync import place, summed


@config
class VQConfig:
    """Keys of every such objective. The losses within the quantiser are arguments of the model, such as its
    commitment_weight."""

    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    init_from: str | None = None  # a shipped model, a folder, a released checkpoint or its file to start from
    freeze: tuple[str, ...] = ()  # name patterns of the tokenizer's parameters that are not trained: encoder.*
    l1_weight: float = 0.2
    l2_weight: float = 1.0
    quantizer_weight: float = 1.0  # of commitment and codebook losses
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
    codebook: Literal["gradient", "ema"] = "gradient"  # how codes follow what they code
    codebook_decay: float = 0.99  # of the ema codebook
    restart_every: int = 100  # steps between restarts of dead codes; 0: never
    restart_below: float = 0.03  # a code is dead when used less than this share of the mean
    restart_until: float = 0.7  # share of the steps after which codes are left alone

    def __post_init__(self) -> None:
        if self.perceptual_weight < 0 or self.adversarial_weight < 0 or self.quantizer_weight < 0:
            raise ConfigError("objective: loss weights must not be negative")


class VQTraining(Objective):
    """Owns the tokenizer, the discriminator with its optimiser phase, and the perceptual net."""

    kind: type[Any]
    """Class of the tokenizer. Its quantiser is a `CodeUsage`, its forward gives a reconstruction and a `Quantized`."""
    released_arguments: frozenset[str] = frozenset()
    """Constructor arguments that may also change when a released file is opened."""
    adaptive_eps = 1e-6
    cluster_size: Tensor  # V, of the ema codebook
    cluster_sum: Tensor  # V C

    def __init__(self, config: Any, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = self._build()
        self.notes += self._freeze()
        self.image_size = self.tokenizer.image_size
        self.discriminator: nn.Module | None = None
        if config.adversarial_weight:
            self.discriminator = self._discriminator()
        self.perceptual = False
        if config.perceptual_weight and min(self.image_size) >= SMALLEST_SIDE:
            lpips = find_lpips(config.lpips)
            if lpips is not None:
                self.freeze("lpips", lpips)
                self.perceptual = True
        quantizer = self.tokenizer.quantize
        quantizer.defer_usage = True  # micro-batches of a step are counted as one batch
        if config.codebook == "ema":
            quantizer.embedding.weight.requires_grad_(False)
            self.register_buffer("cluster_size", torch.ones(quantizer.embedding.num_embeddings))
            self.register_buffer("cluster_sum", quantizer.codebook.detach().clone())
        self.fakes: list[Tensor] = []  # reconstructions of this step, for the discriminator's turn
        self.coded: list[Quantized] = []
        self.max_steps = 1

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
        free = self.kind.free_arguments
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
        lines = finetune.freeze(self.tokenizer.train().requires_grad_(True), self.config.freeze)
        if not self.tokenizer.quantize.codebook.requires_grad and self.config.codebook == "ema":
            raise ConfigError("objective.freeze holds the codebook, objective.codebook=ema moves it: choose one")
        last = self.tokenizer.decoder.conv_out.weight
        if self.config.adversarial_weight and self.config.adaptive and not last.requires_grad:
            raise ConfigError(
                "objective.adaptive weighs the adversarial loss by gradients of decoder.conv_out.weight, which "
                "objective.freeze holds; set objective.adaptive=false or adversarial_weight=0"
            )
        self.codebook_frozen = (
            not self.tokenizer.quantize.codebook.requires_grad
        )  # the loop switches gradients by phase
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
            assert self.discriminator is not None
            logits = self.discriminator(torch.cat([images, self.fakes.pop(0)]))  # one batch for BatchNorm
            real, fake = logits.chunk(2)
            loss = discriminator_loss(self.config.adversarial_loss, real, fake)
            return {"loss": loss, "logit_real": real.float().mean(), "logit_fake": fake.float().mean()}
        if not self.coded:  # a step begins: the count is not saved, so a resumed run must get it from here
            self.tokenizer.quantize.records = step
        reconstruction, quantized = self.tokenizer(images)
        self.coded.append(quantized)
        c, adversarial = self.config, "discriminator" in self.phases(step)
        losses = tokenizer_loss(
            images,
            reconstruction,
            c.quantizer_weight * quantized.loss,
            self.tokenizer.decoder.conv_out.weight,
            l1_weight=c.l1_weight,
            l2_weight=c.l2_weight,
            perceptual=self.frozen("lpips") if self.perceptual else None,
            perceptual_weight=c.perceptual_weight,
            discriminator=self.discriminator if adversarial else None,
            adversarial_weight=c.adversarial_weight,
            adversarial_loss=c.adversarial_loss,
            adaptive=c.adaptive,
            adaptive_low=c.adaptive_low,
            adaptive_high=c.adaptive_high,
            adaptive_eps=self.adaptive_eps,
        )
        if adversarial:
            self.fakes.append(reconstruction.detach())
        return {**losses, "quantizer": quantized.loss}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        coded, self.coded = self.coded, []
        self.fakes.clear()
        self.tokenizer.quantize.commit_usage()
        if self.config.codebook == "ema":
            self._follow_means(coded)
        every, until = self.config.restart_every, self.config.restart_until * self.max_steps
        if every and step % every == 0 and step <= until and not self.codebook_frozen:
            self._restart_dead_codes(coded, step, rng)

    def discard_step(self) -> None:
        self.coded.clear()
        self.fakes.clear()
        self.tokenizer.quantize.pending = None
        for module in self.modules():  # its running statistics, used by nobody in training, saw the bad batch
            if isinstance(module, nn.BatchNorm2d) and not bool(module.state_dict()["running_var"].isfinite().all()):
                module.reset_running_stats()

    def _follow_means(self, coded: list[Quantized]) -> None:
        """Each code becomes the moving mean of what it codes (VQ-VAE, arXiv 1711.00937, appendix A)."""
        ids = torch.cat([i.flatten() for q in coded for i in q.ids])
        z = torch.cat([r for q in coded for r in q.residuals])
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(self.cluster_sum).index_add_(0, ids, z)
        counts, sums = summed(counts), summed(sums)
        self.cluster_size.lerp_(counts, 1 - self.config.codebook_decay)
        self.cluster_sum.lerp_(sums, 1 - self.config.codebook_decay)
        seen = self.cluster_size > 1e-3  # a code that nothing uses keeps its place
        mean = self.cluster_sum / self.cluster_size.clamp_min(1e-3)[:, None]
        codebook = self.tokenizer.quantize.codebook
        codebook.copy_(torch.where(seen[:, None], mean, codebook))

    def _restart_dead_codes(self, coded: list[Quantized], step: int, rng: Rng) -> None:
        """Move codes that nothing uses onto residuals of this step's images, all scales alike.

        Which ones is a function of the seed and the step: the same however the step's images were shared out.
        """
        quantizer = self.tokenizer.quantize
        hits = quantizer.ema_vocab_hit_SV
        use = hits.sum(0)
        dead = use < self.config.restart_below * use.mean()
        count = int(dead.sum())
        if count == 0:
            return
        u = Rng.for_keys(int(rng.seeds[0]), torch.tensor([step])).uniform(torch.arange(count), Draw.RESTART, count=2)[0]
        process, processes = place()
        images = len(coded[0].ids[0])  # of one micro-batch
        fresh = torch.zeros_like(quantizer.codebook[:count])
        for row, (which_scale, which) in enumerate(u.tolist()):
            scale = int(which_scale * len(coded[0].residuals))
            spots = len(coded[0].residuals[scale]) // images
            image, spot = divmod(int(which * images * len(coded) * processes * spots), spots)
            part, image = divmod(image, images * processes)  # as StepBatches shares a step out
            owner, image = divmod(image, images)
            if owner == process:
                fresh[row] = coded[part].residuals[scale][image * spots + spot]
        summed(fresh)
        quantizer.codebook[dead] = fresh
        hits[:, dead] = use.mean() / len(hits)
        if self.config.codebook == "ema":
            self.cluster_size[dead] = 1.0
            self.cluster_sum[dead] = fresh

    # ---- what is shown --------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Usage (share of codes with at least 8 % of the mean use) and perplexity, per scale and over all."""
        hits = self.tokenizer.quantize.ema_vocab_hit_SV.cpu()
        numbers: dict[str, float] = {}
        rows = {f"scale{k}": row for k, row in enumerate(hits)} | {"all": hits.sum(0)}
        for name, row in rows.items():
            p = row / row.sum().clamp_min(1e-12)
            numbers[f"usage/{name}"] = float((row >= 0.08 * row.mean()).float().mean())
            numbers[f"perplexity/{name}"] = float(torch.special.entr(p).sum().exp())
        return numbers

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        images = batch["images"]
        mse = F.mse_loss(self._reconstruct(images), images, reduction="none").mean((1, 2, 3))
        return {"psnr": (10 * torch.log10(4 / mse)).mean(), "l2": mse.mean()}

    def _reconstruct(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.tokenizer.decode(self.tokenizer.encode(images)).float())

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Originals and, below each row of them, their reconstructions."""
        images = batch["images"][:16]
        pairs = zip(images.split(8), self._reconstruct(images).split(8), strict=True)
        return torch.cat([row for pair in pairs for row in pair])

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
