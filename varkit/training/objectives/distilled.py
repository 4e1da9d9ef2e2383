"""Distilling a teacher into a student that draws in one pass or two (Distilled Decoding, arXiv 2412.17153).

Data are trajectories (`varkit trajectories`): classes, noise, and the tokens that the teacher's map makes of it. The
student sees the first t units as data and the noise of all others, t being one of the times that it is to sample with,
and learns to predict the tokens there: by cross entropy of its logits, and by a distance of its vectors, of the codes
themselves or of the images that they decode to.

The authors released no training code. From their scripts' options: an EMA whose weights are used, a distance that is
LPIPS of decoded images by default (here `perceptual_weight`), and a split of the losses between the heads
(`split_losses`). Weights of the losses, learning rate and length are unknown; those here are our own.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.data.trajectories import TrajectoryInfo
from varkit.generators.distilled import Prediction
from varkit.generators.distilled_llamagen import DistilledLlamaGen
from varkit.generators.distilled_var import DistilledVAR
from varkit.generators.llamagen import LlamaGen
from varkit.generators.var import VAR
from varkit.interfaces import Losses, Objective
from varkit.metrics.lpips import SMALLEST_SIDE, find_lpips
from varkit.pipelines.auto import AutoPipeline, assemble, open_transformer
from varkit.pipelines.fingerprint import fingerprint, tokenizer_fingerprint
from varkit.rng import Draw, Rng

STUDENTS: dict[type[Any], type[Any]] = {VAR: DistilledVAR, LlamaGen: DistilledLlamaGen}
"""Teacher -> student."""

MAKE = "make some with `varkit trajectories TEACHER --num N --out DIR`"


@config
class Config:
    """A student, and how it learns. Losses are means over the positions that are noise."""

    name: Literal["distilled"] = "distilled"
    teacher: str  # a shipped model, a folder of a pipeline, a released checkpoint: what drew the trajectories
    init_from: str | None = None  # a student to start from; None: the teacher's weights
    model_overrides: dict[str, Any] = field(default_factory=dict)  # such as dropout; what no weight depends on
    times: tuple[int, ...] = (0,)  # units that are known at each pass; (0,) is one step
    split: int | None = None  # sampling reads units before it from the logits, the others from the vectors; None: all
    split_losses: bool = False  # teach each head only what it is read for
    logits_weight: float = 1.0  # of the cross entropy
    vectors_weight: float = 1.0  # of the squared distance of vectors, in variances of the codebook
    pixels_weight: float = 0.0  # of the squared distance of decoded images
    perceptual_weight: float = 0.0  # of their LPIPS (VGG)
    lpips: str = "auto"  # auto, or a folder with the two weight files
    keep_teacher: bool = False  # export the teacher beside the student, for sampling with teacher_start
    gradient_checkpointing: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)  # further settings of the exported pipeline's sampler

    def __post_init__(self) -> None:
        weights = (self.logits_weight, self.vectors_weight, self.pixels_weight, self.perceptual_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError("objective: loss weights must not be negative, nor all of them 0")
        if self.split is None and self.split_losses:
            raise ConfigError("objective.split_losses needs objective.split; without one the logits are read for all")


class Training(Objective):
    """Owns the student; the tokenizer is frozen, and the teacher is only kept to be exported."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        pipeline = AutoPipeline.from_pretrained(config.teacher)
        teacher, tokenizer = pipeline.transformer, pipeline.image_tokenizer
        if type(teacher) not in STUDENTS:
            known = ", ".join(kind.__name__ for kind in STUDENTS)
            raise ConfigError(f"objective.teacher: {config.teacher} is a {type(teacher).__name__}; students: {known}")
        self.fingerprints = {
            "teacher": fingerprint({"transformer": teacher}),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        self.freeze("tokenizer", tokenizer)
        self.image_size = tokenizer.image_size
        self.model: Any = self._build(teacher).train().requires_grad_(True)
        self.model.layout.require(tokenizer.layout, "the student", f"the tokenizer of {config.teacher}")
        if config.keep_teacher:
            self.freeze("teacher", teacher)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.perceptual_weight:
            self.freeze("lpips", self._lpips())
        self.max_steps = 1
        self._pipeline().sampler.count_steps(self.model)  # what the sampler cannot do is refused now, not at the end

    def _build(self, teacher: Any) -> Any:
        kind, c = STUDENTS[type(teacher)], self.config
        if c.init_from is not None:
            return open_transformer(c.init_from, kind, **c.model_overrides)[0].float()
        try:
            return kind.of_teacher(teacher, **c.model_overrides)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"objective.model_overrides {c.model_overrides} do not fit the teacher: {error}"
            ) from None

    def _lpips(self) -> nn.Module:
        if min(self.image_size) < SMALLEST_SIDE:
            raise ConfigError(
                f"objective.perceptual_weight: LPIPS needs images of at least {SMALLEST_SIDE} pixels a side, these "
                f"have {min(self.image_size)}; use pixels_weight"
            )
        found = find_lpips(self.config.lpips)
        if found is None:
            raise ConfigError("objective.perceptual_weight needs the weights of LPIPS: name their folder in lpips")
        return found

    def trained(self, phase: str) -> nn.Module:
        return self.model

    # ---- what it can learn from ---------------------------------------------------------------------------

    def check_images(self, source: str) -> None:
        """Raises ConfigError: images have no noise that they are made of."""
        raise ConfigError(f"{source} holds images; a student learns from trajectories: {MAKE}")

    def check_codes(self, codes: CodeInfo) -> None:
        """Raises ConfigError unless they are trajectories of the teacher."""
        if not isinstance(codes, TrajectoryInfo):
            raise ConfigError(f"{codes.source} was coded by `{codes.made_by}`; a student needs trajectories: {MAKE}")
        made = {"teacher": codes.teacher, "tokenizer": codes.fingerprint}
        for part, own in self.fingerprints.items():
            if made[part] != own:
                raise ConfigError(
                    f"the trajectories are of {codes.source} (fingerprint of the {part} {made[part]}); "
                    f"objective.teacher {self.config.teacher} is another ({own})"
                )

    # ---- losses -------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        times = torch.tensor(self.config.times, device=batch["labels"].device)
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.PREFIX)[:, 0].to(times.device)
        return self.losses(batch, times[(u * len(times)).long()])

    def losses(self, batch: dict[str, Tensor], t: Tensor) -> Losses:
        """Args: batch: `tokens` (B, L), `noise` (B, L, C), `labels` (B,).   t: (B,) units that are known."""
        c, tokens, model = self.config, batch["tokens"], self.model
        codebook = self.frozen("tokenizer").codebook
        target = codebook[tokens]  # B L C
        out: Prediction = model(model.mix(target, batch["noise"], t), batch["labels"], model.known(t))
        by_logits = by_vectors = (~model.known(t)).float()  # B L
        if c.split_losses:
            first = model.units < c.split
            by_logits, by_vectors = by_logits * first, by_vectors * ~first
        cross_entropy = F.cross_entropy(out.logits.transpose(1, 2), tokens, reduction="none")
        squares = (out.vectors - target).square().mean(-1) / codebook.var()
        losses: Losses = {
            "cross_entropy": average(cross_entropy, by_logits),
            "distance": average(squares, by_vectors),
            "accuracy": average((out.logits.detach().argmax(-1) == tokens).float(), by_logits),
        }
        loss = c.logits_weight * losses["cross_entropy"] + c.vectors_weight * losses["distance"]
        if c.pixels_weight or c.perceptual_weight:
            images, wanted = self._decoded(torch.where(by_vectors.bool()[..., None], out.vectors, target), target)
            if c.pixels_weight:
                losses["pixels"] = F.mse_loss(images, wanted)
                loss = loss + c.pixels_weight * losses["pixels"]
            if c.perceptual_weight:
                losses["lpips"] = self.frozen("lpips")(images, wanted).mean()
                loss = loss + c.perceptual_weight * losses["lpips"]
        return {"loss": loss, **losses}

    def _decoded(self, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        tokenizer = self.frozen("tokenizer")
        with torch.no_grad():
            wanted = tokenizer.decode(target).float()
        return tokenizer.decode(vectors).float(), wanted

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """Means over the times, and what each time has of accuracy and distance."""
        found: Losses = {}
        for time in self.config.times:
            losses = self.losses(batch, torch.full_like(batch["labels"], time))
            for name, value in losses.items():
                found[name] = found.get(name, torch.zeros_like(value)) + value / len(self.config.times)
            if len(self.config.times) > 1:
                found |= {f"{name}_{time}": losses[name] for name in ("accuracy", "distance")}
        return found

    # ---- what is shown and written ------------------------------------------------------------------------

    def _pipeline(self) -> Any:
        sampling = {"times": self.config.times, "split": self.config.split, **self.config.sampling}
        pipeline = assemble(self.model, self.frozen("tokenizer"), sampling)
        if self.config.keep_teacher:
            pipeline.register_modules(teacher=self.frozen("teacher"))
        pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(self.classes)} or None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Up to ten classes, five images each, by the sampler's default settings."""
        classes = torch.arange(self.model.num_classes)[:10].repeat(5).tolist()
        out = self._pipeline()(class_labels=classes, rng=Rng.from_seed(0, len(classes)), output_type="pt")
        return out.images * 2 - 1

    def export(self, folder: Path) -> None:
        self._pipeline().save_pretrained(folder)


def average(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of `values` (B, L) where `weight` (B, L) is 1; 0 where that is nowhere."""
    return (values * weight).sum() / weight.sum().clamp_min(1)
