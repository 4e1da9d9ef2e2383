"""Training the EAGLE drafter of a trained generator: regression of its last hidden states, on the fly.

Sources: Li et al., arXiv 2401.15077; SafeAILab/EAGLE: eagle/train/main.py (cb7e084); jadohu/LANTERN:
entrypoints/train_drafter (3a56e45). What differs: the states are computed for each batch by the frozen target, no files
of them; guided training mixes logits as sampling does, uncond + w (cond - uncond), where the release trains with w + 1.

Shapes: B images, L image tokens, P prefix entries of the drafter, n = P + L - 1 entries, C width, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.conditioning.label import LabelCondition
from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.generators.eagle import Eagle
from varkit.generators.llamagen import LlamaGen
from varkit.interfaces import Cond, Losses, Objective
from varkit.pipelines.auto import open_tokenizer, open_transformer
from varkit.rng import Draw, Rng
from varkit.training.captions import Captions
from varkit.training.objectives.generation import require_same_tokenizer


@config
class Config:
    """A drafter and how it learns."""

    name: Literal["eagle"] = "eagle"
    target: str  # whose drafter: a shipped model, a folder, a released checkpoint or its file
    tokenizer: str | None = None  # None: of the target, which is then a pipeline
    hidden_weight: float = 1.0  # of the smooth L1 distance of the states
    token_weight: float = 0.1  # of the cross entropy of the target's law
    noise: float = 0.2  # width of the uniform noise on what is read, for 512 entries; fewer get more, as released
    null_rate: float = 0.1  # how often an image is read without its condition
    guidance_scale: float | None = None  # instead: each image with and without it, cross entropy of the guided laws
    features: str | None = None  # of a target of texts: a folder of `varkit features` with all captions
    text_encoder: str | None = None  # instead: a transformers encoder that makes them anew for each batch

    def __post_init__(self) -> None:
        if not 0 <= self.null_rate <= 1:
            raise ConfigError(f"objective.null_rate must be in [0, 1]; got {self.null_rate}")
        for name in ("hidden_weight", "token_weight", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name} must not be negative; got {getattr(self, name)}")
        if self.features is not None and self.text_encoder is not None:
            raise ConfigError("objective.features and objective.text_encoder both make features of captions: give one")


def drafter_loss(
    predicted: Tensor,
    target: Tensor,
    head: Callable[[Tensor], Tensor],
    mask: Tensor,
    *,
    hidden_weight: float = 1.0,
    token_weight: float = 0.1,
    epsilon: float = 1e-5,
    guide: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Losses:
    """How far predicted states are from the target's, and the laws that its head makes of them.

    Args:
        predicted, target: (R, n, C).   head: states -> logits.   mask: (R, n), 0 where nothing counts.
        epsilon: added to the number of entries that count.
        guide: logits (R, n, V) -> of fewer rows, the first ones: those with a condition.
    Returns: loss; hidden; token; overlap, the share of drafts that one exact verification would accept.
    """
    mask = mask.to(predicted.dtype)
    distance = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    hidden = (distance * mask).sum() / (mask.sum() + epsilon)
    with torch.no_grad():
        wanted = guide(head(target).float()).log_softmax(-1)
    said = guide(head(predicted).float()).log_softmax(-1)
    counted = mask[: len(said)]
    token = -((wanted.exp() * said).sum(-1) * counted).sum() / (counted.sum() + epsilon)
    common = torch.minimum(wanted, said.detach()).exp().sum(-1)
    return {
        "loss": hidden_weight * hidden + token_weight * token,
        "hidden": hidden,
        "token": token,
        "overlap": (common * counted).sum() / (counted.sum() + epsilon),
    }


class Training(Objective):
    """Owns the drafter; target, tokenizer and text encoder are frozen."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        target, names = open_transformer(config.target, LlamaGen)
        tokenizer = open_tokenizer(config.tokenizer or config.target)
        target.layout.require(tokenizer.layout, "the target", f"tokenizer {config.tokenizer or config.target}")
        self._check_classes(target, names, classes)
        self.image_size = tokenizer.image_size
        self.freeze("target", target)
        self.freeze("tokenizer", tokenizer)
        self.captions = self._open_captions(target)
        self.condition = LabelCondition(target.num_classes)
        self.model = Eagle.of(target)
        self.max_steps = 1

    def _check_classes(self, target: Any, names: dict[int, str], classes: list[str]) -> None:
        if target.condition != "class" or not classes:
            return
        known = [names.get(i, str(i)) for i in range(target.num_classes)]
        if len(classes) > target.num_classes or (names and known[: len(classes)] != classes):
            raise ConfigError(
                f"objective.target {self.config.target} has {target.num_classes} classes ({', '.join(known[:4])}, "
                f"...), the data {len(classes)} ({', '.join(classes[:4])}, ...): train the drafter on the target's own "
                f"data"
            )

    def _open_captions(self, target: Any) -> Captions | None:
        given = self.config.features is not None or self.config.text_encoder is not None
        if given != (target.condition == "text"):
            raise ConfigError(
                f"objective.target {self.config.target} is conditioned on {target.condition}: "
                + ("leave out features and text_encoder" if given else "give objective.features or text_encoder")
            )
        if not given:
            return None
        captions = Captions(self.config.features, self.config.text_encoder)
        captions.fit(target)
        if captions.network is not None:
            self.freeze("text_encoder", captions.network)
        return captions

    def trained(self, phase: str) -> nn.Module:
        return self.model

    def check_codes(self, codes: CodeInfo) -> None:
        """Raises ConfigError when another tokenizer made them."""
        require_same_tokenizer(self.frozen("tokenizer"), self.config.tokenizer or self.config.target, codes)

    def check_texts(self, name: str, texts: Sequence[str] | None) -> None:
        """Raises ConfigError when a target of texts has no captions, or no features of some."""
        if self.captions is not None:
            self.notes += self.captions.check(name, texts)

    def head(self, hidden: Tensor) -> Tensor:
        return self.frozen("target").output(hidden)

    def guide(self, logits: Tensor) -> Tensor:
        """uncond + w (cond - uncond) of the two halves of a batch, with a guidance_scale."""
        if self.config.guidance_scale is None:
            return logits
        cond, null = logits.chunk(2)
        return torch.lerp(null, cond, self.config.guidance_scale)

    def cond(self, batch: dict[str, Any], rng: Rng) -> Cond:
        """Of R rows: some without a condition; or all, and all without below them."""
        target = self.frozen("target")
        if self.captions is None:
            cond = self.condition.encode(class_labels=batch["labels"].clamp_min(0))
        else:
            cond = self.captions.encode(batch["texts"], target, batch["labels"].device)
        if self.config.guidance_scale is not None:
            return cond.beside(target.null(cond))
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0]
        return target.replace_by_null(cond, u < self.config.null_rate)

    @torch.no_grad()
    def pairs(self, batch: dict[str, Any], rng: Rng) -> tuple[Tensor, Tensor]:
        """What is read and learned: ids (R, n), the token ahead of each state; states (R, n + 1, C) of the target."""
        target, tokenizer = self.frozen("target"), self.frozen("tokenizer")
        tokens = batch["tokens"] if "tokens" in batch else tokenizer.encode(batch["images"])
        cond = self.cond(batch, rng)
        tokens = tokens.repeat(len(cond) // len(tokens), 1)
        states = target.last_states(tokenizer.embed(tokens), cond)
        return F.pad(tokens[:, :-1], (self.model.prefix_length, 0)), states

    def _losses(self, batch: dict[str, Any], rng: Rng) -> Losses:
        ids, states = self.pairs(batch, rng)
        read = states[:, :-1]
        if self.training and self.config.noise:
            every = torch.arange(ids.shape[1], device=ids.device)
            u = rng.uniform(every, Draw.NOISE, count=read.shape[2]).to(read.device)
            u = u.repeat(len(read) // len(u), 1, 1)
            read = read + ((u - 0.5) * self.config.noise * 512 / ids.shape[1]).to(read.dtype)
        mask = torch.ones_like(ids)
        mask[:, : self.model.prefix_length] = 0
        weights = {"hidden_weight": self.config.hidden_weight, "token_weight": self.config.token_weight}
        return drafter_loss(self.model(ids, read), states[:, 1:], self.head, mask, guide=self.guide, **weights)

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        return self._losses(batch, rng)

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        return self._losses(batch, rng)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
