"""Training a VQ or FSQ tokenizer of clips: a causal one, or one of images that codes frame by frame.

All losses compare frames: likeness, a perceptual distance and a discriminator see each frame as an image. NBP
(arXiv 2502.07737) trains its causal tokenizer with a PatchGAN, by code that is not released, and MAGVIT-v2 (arXiv
2310.05737) with a discriminator of clips, which is not here.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from varkit import registry
from varkit.config import ConfigError, config
from varkit.interfaces import Losses
from varkit.layers.code_usage import CodeUsage
from varkit.pictures import SHOWN_FRAMES, rows_of_frames
from varkit.pipelines.auto import open_tokenizer
from varkit.rng import Rng
from varkit.tokenizers.frames import FrameTokenizer
from varkit.training.objectives.reconstruction import ReconstructionTraining
from varkit.training.objectives.vq_tokenizer import VQConfig, VQTraining

CLIPS = True


@config
class Config(VQConfig):
    """A tokenizer of clips and its losses. Finite scalar quantisation has no codes that move, and so neither
    `codebook: ema` nor restarts."""

    name: Literal["video-vq"] = "video-vq"
    model: str = "magvit2_nbp"  # a registered tokenizer of clips
    l1_weight: float = 1.0
    restart_every: int = 0


class Training(VQTraining):
    """The network that has a `quantize`, whose forward gives a reconstruction and a `Quantized`, is the tokenizer, or
    that of its frames."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__(config, classes)
        self.num_frames = self.tokenizer.num_frames
        self.columns = self.shown = min(SHOWN_FRAMES, cast(int, self.num_frames))

    @property
    def network(self) -> Any:
        return self.tokenizer.frame if isinstance(self.tokenizer, FrameTokenizer) else self.tokenizer

    @property
    def usage(self) -> CodeUsage:
        return cast(CodeUsage, self.network.quantize)

    @property
    def codes(self) -> Tensor:
        return cast(Tensor, self.network.quantize.embedding.weight)

    def _build(self) -> Any:
        source = self.config.init_from
        if source is None:
            self.kind = type(registry.create_model(self.config.model, **self.config.model_overrides))
        else:
            self.kind = type(open_tokenizer(source))
        model = super()._build()
        network = model.frame if isinstance(model, FrameTokenizer) else model
        quantises = isinstance(getattr(network, "quantize", None), CodeUsage) and len(model.layout.grids) == 1
        if model.num_frames is None or not quantises:
            what = "objective.model " + self.config.model if source is None else f"objective.init_from {source}"
            what += f" ({model.layout.describe()})"
            raise ConfigError(
                f"objective video-vq trains tokenizers of clips that quantise: MagViT2, or FrameTokenizer around "
                f"VQGAN; {what} is a {self.kind.__name__}"
            )
        if isinstance(model, FrameTokenizer):
            self.last_layer = "frame.decoder.conv_out.weight"
        return model

    def _freeze(self) -> list[str]:
        if hasattr(self.network.quantize, "embedding"):
            return super()._freeze()
        if self.config.codebook == "ema" or self.config.restart_every:
            raise ConfigError(
                f"objective.codebook=ema and objective.restart_every move codes; the levels of "
                f"{self.config.model} are fixed: leave both out"
            )
        self.codebook_frozen = True
        return ReconstructionTraining._freeze(self)

    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        """Of clips (B, 3, T, H, W)."""
        if not isinstance(self.tokenizer, FrameTokenizer):
            return super().reconstruct(images, step, rng)
        self.begin(step)
        frames, quantized = self.network(self.compared(images))
        self.coded.append(quantized)
        back = frames.unflatten(0, (len(images), -1)).transpose(1, 2)
        return back, self.config.quantizer_weight * quantized.loss, {"quantizer": quantized.loss}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Of four clips some frames in a row, and their reconstructions in the row below."""
        clips = batch["images"][:4]
        return rows_of_frames(torch.stack([clips, self._back(clips)], 1).flatten(0, 1), self.shown)
