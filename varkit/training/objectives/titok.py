"""Training TiTok (Yu et al., arXiv 2406.07550, sections 3.2 and 4.1; one stage: Kim et al., 2501.07730, section 3.1).

Weights are those of bytedance/1d-tokenizer: configs/training (942a96f), for images in [-1, 1]. The legacy models learn
in two stages: first the codes that a frozen MaskGIT VQGAN gives an image ("codes"), then, with all that makes tokens
held, the image itself ("decoder"). The others learn in one.

What differs: the perceptual loss is LPIPS in every stage (the release adds or takes ConvNeXt's logits); the
discriminator is the patch discriminator of the other tokenizers and starts after a share of the run; a clustering
codebook moves once a step, after the optimiser.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from varkit import registry
from varkit.config import ConfigError, config
from varkit.interfaces import Losses
from varkit.layers.code_usage import CodeUsage
from varkit.pipelines.auto import open_tokenizer
from varkit.rng import Rng
from varkit.tokenizers.maskgit_vqgan import MaskGitVQGAN
from varkit.tokenizers.multiscale_vq import Quantized
from varkit.tokenizers.titok import Posterior, TiTok
from varkit.training import finetune
from varkit.training.losses import proxy_code_loss
from varkit.training.objectives.vq_tokenizer import VQConfig, VQTraining
from varkit.training.optim import OptimConfig


@config
class Config(VQConfig):
    """A TiTok and its losses. The defaults are those of one stage; docs/training.md has the second stage's."""

    name: Literal["titok"] = "titok"
    model: str = "titok_bl64_vq8k"  # a registered TiTok
    stage: Literal["one", "codes", "decoder"] = "one"  # codes, then decoder: of the legacy models
    teacher: str | None = None  # of stage codes: a MaskGIT VQGAN: its name, folder, released checkpoint or file
    kl_weight: float = 1e-6  # of a KL model: of the divergence of an image's latents, summed, in nats
    l1_weight: float = 0.0
    l2_weight: float = 0.25  # 1 for images in [0, 1]
    adversarial_weight: float = 0.1
    adversarial_start: float = 0.3
    adaptive: bool = False
    adaptive_low: float = 0.0
    discriminator_optim: OptimConfig = OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, clip=1.0)
    lecam_weight: float = 0.001
    restart_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise ConfigError("objective: loss weights must not be negative")
        if (self.stage == "codes") != (self.teacher is not None):
            raise ConfigError(
                "objective.teacher, a MaskGIT VQGAN such as maskgit_vqgan_f16.in1k_256, goes with objective.stage=codes"
            )
        if self.stage == "decoder" and self.init_from is None:
            raise ConfigError(
                "objective.stage=decoder trains the decoder of a TiTok that has tokens already; name it in "
                "objective.init_from"
            )


class Training(VQTraining):
    """Owns the tokenizer; in stage codes its teacher is frozen."""

    kind = TiTok

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__(config, classes)
        self.moves_codes = False
        if self.usage is not None:
            quantizer = self.tokenizer.quantize
            quantizer.defer_clustering = True
            self.moves_codes = quantizer.clustering and not self.codebook_frozen

    # ---- set-up -------------------------------------------------------------------------------------------------

    def _build(self) -> TiTok:
        if self.config.teacher is not None:
            teacher = open_tokenizer(self.config.teacher)
            if not isinstance(teacher, MaskGitVQGAN):
                raise ConfigError(
                    f"objective.teacher must be a MaskGIT VQGAN; {self.config.teacher} holds a {type(teacher).__name__}"
                )
            self.freeze("teacher", teacher)
            with torch.device("meta"):
                new = self.config.init_from is None and registry.model_entry(self.config.model).build()
            if isinstance(new, TiTok):  # it gets the sizes of its painter from the teacher
                sizes = {**painter_sizes(teacher), **self.config.model_overrides}
                self.config = replace(self.config, model_overrides=sizes)
        model: TiTok = super()._build()
        self._check(model)
        if self.config.stage == "codes":
            self._learn_from(model, self.frozen("teacher"))
        self.last_layer = "pixel_decoder.conv_out.weight" if model.config.legacy else "decoder.conv_out.weight"
        if model.layout.codebook_size is not None:
            self.counter = CodeUsage(1, model.config.codebook_size)
        return model

    def _check(self, model: TiTok) -> None:
        """Raises ConfigError where model and configuration do not go together."""
        c, name = self.config, self.config.init_from or self.config.model
        if model.config.text_length:
            raise ConfigError(
                f"{name} is text-aware: its decoder reads a caption, which image folders do not have. Train a TiTok "
                f"such as titok_bl64_vq8k"
            )
        if c.stage == "one" and model.config.legacy:
            raise ConfigError(
                f"{name} is of the two-stage kind: objective.stage=codes with objective.teacher, then stage=decoder"
            )
        if c.stage == "codes" and not model.config.legacy:
            raise ConfigError(
                f"{name} makes pixels, not a VQGAN's codes: objective.stage=codes is for the legacy models, such as "
                f"titok_l32; train it with stage=one"
            )
        if model.layout.codebook_size is None:
            if c.codebook == "ema" or c.restart_every:
                raise ConfigError(f"{name} is a KL model without codes: leave out codebook=ema and restart_every")
        elif model.config.clustering and c.codebook == "ema":
            raise ConfigError(f"{name} has a clustering codebook, objective.codebook=ema moves it too: choose one")

    def _learn_from(self, model: TiTok, teacher: MaskGitVQGAN) -> None:
        """Take the teacher's codebook and decoder as the painter of `model`. Raises ConfigError where they do not
        fit."""
        wanted, given = painter_sizes(teacher), model.config
        wrong = [k for k in wanted if finetune.plain(wanted[k]) != finetune.plain(given[k])]
        if wrong:
            raise ConfigError(
                f"objective.teacher {self.config.teacher} and the TiTok do not fit together: "
                + ", ".join(f"{k} {wanted[k]} and {given[k]}" for k in wrong)
            )
        if teacher.image_size != model.image_size or teacher.config.image_channels != 3:
            raise ConfigError(
                f"objective.teacher {self.config.teacher} codes images of {teacher.image_size} with "
                f"{teacher.config.image_channels} channels; a TiTok learns from one of square RGB images"
            )
        model.pixel_quantize.load_state_dict(teacher.quantize.state_dict())
        model.pixel_decoder.load_state_dict(teacher.decoder.state_dict())

    def held(self) -> tuple[str, ...]:
        if self.config.stage == "codes":
            return ("pixel_quantize.*", "pixel_decoder.*")
        if self.config.stage == "decoder":
            return ("encoder.*", "latent_tokens", *(("quantize.*",) if self.usage is not None else ()))
        return ()

    def compares_images(self) -> bool:
        return bool(self.config.stage != "codes")

    @property
    def usage(self) -> CodeUsage | None:
        return self.counter if self.tokenizer.layout.codebook_size is not None else None

    # ---- losses -------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        if self.config.stage != "codes":
            return super().forward(batch, phase, step, max_steps, rng)
        images = batch["images"]
        with torch.no_grad():
            codes = self.frozen("teacher").encode(images)
        vectors, code = self.tokenizer.code(images)
        _, log = self._middle(code, step)
        logits = self.tokenizer.proxy_logits(self.tokenizer.latents(vectors))
        loss = proxy_code_loss(logits, codes, code.loss, self.config.quantizer_weight)
        return {"loss": loss, **log, "accuracy": accuracy(logits, codes)}

    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        out = self.tokenizer(images, rng, frozen=self.config.stage == "decoder")
        return out.images, *self._middle(out.code, step)

    def _middle(self, code: Any, step: int) -> tuple[Tensor, Losses]:
        """What the middle adds to the loss, and its numbers; codes are remembered for the end of the step."""
        if isinstance(code, Posterior):
            divergence = code.kl().sum(1).mean()
            return self.config.kl_weight * divergence, {"kl": divergence}
        self.begin(step)
        self.coded.append(Quantized(code.vectors, code.loss, [code.ids], [code.features.flatten(0, 1)]))
        self.counter.record_usage([code.ids])
        return self.config.quantizer_weight * code.loss, {"quantizer": code.loss}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        if self.moves_codes:
            self.tokenizer.quantize.revive(torch.cat([q.residuals[0] for q in self.coded]))
        super().after_step(step, rng)

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """PSNR of reconstructions; in stage codes also how many of the teacher's codes are right."""
        numbers = super().validate(batch, rng)
        if self.config.stage == "codes":
            tokens = self.tokenizer.encode(batch["images"])
            logits = self.tokenizer.proxy_logits(self.tokenizer.latents(tokens))
            numbers["accuracy"] = accuracy(logits, self.frozen("teacher").encode(batch["images"]))
        return numbers


def painter_sizes(teacher: MaskGitVQGAN) -> dict[str, Any]:
    """The constructor arguments of a legacy TiTok that its VQGAN decides."""
    c = teacher.config
    return {
        "resolution": teacher.image_size[0],
        "patch": teacher.downsampling,
        "proxy_codes": c.codebook_size,
        "proxy_dim": c.latent_dim,
        "proxy_channels": c.base_channels,
        "proxy_multipliers": c.channel_multipliers,
        "proxy_blocks": c.num_res_blocks,
    }


def accuracy(logits: Tensor, codes: Tensor) -> Tensor:
    """(B, V, h, w) and (B, h w) -> the share of positions whose largest logit is that of the code."""
    return (logits.detach().argmax(1).flatten(1) == codes).float().mean()
