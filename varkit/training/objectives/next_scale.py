"""Training VAR on a frozen multi-scale tokenizer.

Source: FoundationVision/VAR: train.py, trainer.py (78b9539); paper arXiv 2404.02905, section 4.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from varkit import registry
from varkit.conditioning.label import LabelCondition
from varkit.config import ConfigError, config
from varkit.generators.var import VAR
from varkit.interfaces import Losses, Objective
from varkit.pipelines.auto import open_tokenizer
from varkit.pipelines.class_to_image import ClassToImagePipeline
from varkit.rng import Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.tokenizers.multiscale_vq import MultiScaleVQ
from varkit.training import finetune, lora
from varkit.training.codes import CodeMemory
from varkit.training.objectives.variants.arra import FrozenEncoder
from varkit.training.objectives.variants.combined import Together, VariantConfig, Variants
from varkit.training.optim import OptimConfig


@config
class Config(VariantConfig, finetune.FinetuneConfig):
    """A VAR transformer and how it learns.

    `VariantConfig` has further objectives, each a section; `FinetuneConfig` how to start from a trained model.
    """

    name: Literal["next-scale"] = "next-scale"
    tokenizer: str  # a shipped model, a folder (of a tokenizer or a pipeline), a released checkpoint or its file
    model: str = "var_d16"  # a registered generator, trained from nothing; the tokenizer gives its sizes
    label_smoothing: float = 0.0
    gamma_gain: float = 1e-3  # initial size of the gates' weights (official alng)
    progressive: float = 0.0  # share of the steps until all scales are trained (official pg); 0: always all
    progressive_from: int = 4  # scales after the first at the start (official pg0)
    gradient_checkpointing: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)  # default sampler settings of the exported pipeline

    def __post_init__(self) -> None:
        if not 0 <= self.progressive <= 1:
            raise ConfigError(f"objective.progressive is a share of the steps, 0 to 1; got {self.progressive}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"objective.label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.progressive and self.mixed_prediction is not None:
            raise ConfigError(
                "objective.progressive trains the first scales only, objective.mixed_prediction predicts all: "
                "choose one"
            )
        super().__post_init__()
        self.check_finetuning()


def progressive_stage(step: int, max_steps: int, warmup: int, share: float, first: int, last: int) -> tuple[int, float]:
    """Which scale is the newest at `step`, and the weight of its loss.

    Args: share: of the steps until the last scale.   first, last: scale indices.
    Source: FoundationVision/VAR: train.py:232-240, trainer.py:76-92.
    """

    def newest(s: int) -> int:
        end = max_steps * share
        if s <= warmup:
            return first
        if s >= end:
            return last
        return first + round((s - warmup) / (end - warmup) * (last - first))

    scale = newest(step)
    if scale in (first, last):
        return scale, 1.0
    low, high = 0, step  # the first step of this stage, by bisection: stages never go back
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if newest(middle) < scale else (low, middle)
    return scale, min(max((step - low + 1) / max(max_steps / 300, 1), 0.01), 1.0)


class Training(Objective):
    """Owns the transformer; the tokenizer is frozen, and its codes are made anew for each batch."""

    shards = True

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        tokenizer = open_tokenizer(config.tokenizer)
        self.freeze("tokenizer", tokenizer)
        self.image_size = tokenizer.image_size
        self.model = self._build(tokenizer)
        self.model.layout.require(tokenizer.layout, "the generator", f"tokenizer {config.tokenizer}")
        self.notes += finetune.prepare(self.model, config)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.condition = LabelCondition(self.model.num_classes)
        self.max_steps, self.warmup = 1, 0
        self.memory: dict[bool, CodeMemory] = {}  # by `training`: set by a sweep, whose members see the same images
        self.sampler = NextGroupSampler(**config.sampling)
        self.variants = self._variants(tokenizer) if config.any_variant else None

    def _variants(self, tokenizer: MultiScaleVQ) -> Variants:
        dim = None
        if self.config.alignment is not None:
            encoder = FrozenEncoder(self.config.alignment.encoder, self.config.alignment.weights)
            self.freeze("encoder", encoder)
            dim = encoder.dim
        return Variants(self.config, self.model, tokenizer, sampling=self.config.sampling, feature_dim=dim)

    def _build(self, tokenizer: MultiScaleVQ) -> VAR:
        if self.config.init_from is not None:
            model, note = finetune.start_from(self.config, VAR, self.classes)
            self.notes.append(note)
            return cast(VAR, model)
        sizes = {
            "num_classes": max(len(self.classes), 1),
            "scales": tokenizer.config.scales,
            "codebook_size": tokenizer.layout.codebook_size,
            "latent_dim": tokenizer.layout.dim,
            **self.config.model_overrides,
        }
        if sizes["num_classes"] < len(self.classes):
            raise ConfigError(
                f"the model has {sizes['num_classes']} classes, the data {len(self.classes)}; set "
                f"objective.model_overrides.num_classes, or leave it out"
            )
        fresh: VAR = registry.create_model(self.config.model, **sizes)
        fresh.init_weights(gamma_gain=self.config.gamma_gain)
        return fresh

    def trained(self, phase: str) -> nn.Module:
        return self.model if self.variants is None else Together(self.model, self.variants)

    def optim(self, phase: str, default: OptimConfig) -> OptimConfig:
        self.warmup = default.warmup_steps
        return default

    def _losses(self, batch: dict[str, Tensor], rng: Rng, **options: Any) -> Losses:
        tokenizer = self.frozen("tokenizer")
        memory = self.memory.get(self.training)
        with torch.no_grad():
            tokens = memory.tokens(batch, tokenizer.encode) if memory else tokenizer.encode(batch["images"])
            inputs = tokenizer.embed(tokens)
        cond = self.condition.encode(class_labels=batch["labels"].clamp_min(0))
        return self.model.training_loss(tokens, inputs, cond, rng, **options)

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        options: dict[str, Any] = {"label_smoothing": self.config.label_smoothing}
        last = len(self.model.layout.grids) - 1
        if self.config.progressive:
            scale, weight = progressive_stage(
                step,
                max_steps,
                self.warmup,
                self.config.progressive,
                min(self.config.progressive_from, last),
                last,
            )
            options |= {"num_scales": scale + 1, "newest_weight": weight}
        if self.variants is None:
            return self._losses(batch, rng, **options)
        return self.variants(
            self.model,
            self.frozen("tokenizer"),
            batch["images"],
            self.condition.encode(class_labels=batch["labels"].clamp_min(0)),
            rng,
            step=step,
            max_steps=max_steps,
            feature=self.frozen("encoder")(batch["images"]) if self.config.alignment is not None else None,
            **options,
        )

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        return self._losses(batch, rng)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Up to ten classes, five images each, by the sampler's default settings."""
        classes = torch.arange(self.model.num_classes, device=batch["images"].device)[:10]
        out = self._pipeline()(
            class_labels=classes.repeat(5).tolist(), rng=Rng.from_seed(0, 5 * len(classes)), output_type="pt"
        )
        return out.images * 2 - 1

    def _pipeline(self, model: VAR | None = None) -> Any:
        names = {str(i): name for i, name in enumerate(self.classes)} or None
        pipeline = ClassToImagePipeline(model or self.model, self.frozen("tokenizer"), self.sampler, id2label=names)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, folder: Path) -> None:
        if self.config.lora is None:
            self._pipeline().save_pretrained(folder)
            return
        self._pipeline(lora.merged(self.model)).save_pretrained(folder)
        lora.write_adapter(self.model, folder / lora.ADAPTER, str(self.config.init_from))
