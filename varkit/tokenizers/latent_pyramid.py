"""Continuous latents at several scales, coarse to fine: the tokens of FlowAR (arXiv 2412.15205) and of xAR's scales.

Nothing is learned here: the scales are the latent of a `KLVAE`, resized; only the last one is decoded.

Source: FlowAR: models/flowar.py (21835c0). What differs: any grid, and no scale must be double the last.

Shapes: B batch, L tokens of all scales, C latent channels, H W sides of the last scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layout import Grid, TokenLayout, square_grids
from varkit.registry import ModelEntry, register_model
from varkit.rng import Rng
from varkit.tokenizers.kl_vae import FASHION, KL16, KLVAE, flatten, unflatten

Resize = Literal["area", "nearest"]

SCALES = (1, 2, 4, 8, 16)
"""Sides of the released scales."""


def pyramid(latents: Tensor, grids: Sequence[Grid], resize: Resize = "area") -> Tensor:
    """Latents (B, C, H, W) resized to each grid and laid end to end: (B, L, C). A grid of their own size keeps them."""
    whole = tuple(latents.shape[-2:])
    maps = [latents if g == whole else F.interpolate(latents, size=g, mode=resize) for g in grids]
    return torch.cat([flatten(m) for m in maps], 1)


def input_of(maps: Tensor, grid: Grid, whole: Grid) -> Tensor:
    """What is read at scale `grid`, from the maps (B, C, h, w) of the scale before: (B, h w, C).

    Never a resize from one scale to the next: up to the whole latent first, bicubic, then averaged down.
    """
    up = F.interpolate(maps.float(), size=whole, mode="bicubic")
    return flatten(F.interpolate(up, size=grid, mode="area"))


def inputs_of(tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Tokens (B, L, C) -> what is read at each scale, (B, L, C): zeros at the first, which reads no tokens."""
    parts = tokens.split([h * w for h, w in grids], 1)
    before = zip(parts, grids, strict=True)
    read = [input_of(unflatten(part, g), after, grids[-1]) for (part, g), after in zip(before, grids[1:], strict=False)]
    return torch.cat([torch.zeros_like(parts[0]), *(part.to(tokens) for part in read)], 1)


class RunningPyramid:
    """The scales of a batch being sampled: what `LatentPyramid.embed` computes at once, scale by scale."""

    def __init__(self, grids: Sequence[Grid], first: Tensor) -> None:
        """Args: first: what the first scale reads, (B, n, C)."""
        self.grids, self.read, self.scale = tuple(grids), first, 0

    def inputs(self, positions: Tensor) -> Tensor:
        return self.read

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        maps = unflatten(tokens, self.grids[self.scale])
        self.scale += 1
        if self.scale < len(self.grids):
            self.read = input_of(maps, self.grids[self.scale], self.grids[-1])


class LatentPyramid(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> latents at every scale, (B, L, C).

    Args:
        vae_config: arguments of the `KLVAE` below; its image_size is the tokenizer's.
        scales: sides, or (h, w) pairs, coarse to fine; the last one is the VAE's own.
        resize: how coarser scales are made of the latent: `area`, the mean of what a token covers (FlowAR), or
            `nearest` (xAR).
    Raises: ValueError when the last scale is not the VAE's, or on another way to resize.
    """

    @register_to_config
    def __init__(
        self,
        vae_config: Mapping[str, Any] | None = None,
        scales: Sequence[int | Sequence[int]] = SCALES,
        resize: Resize = "area",
    ) -> None:
        super().__init__()
        self.vae = KLVAE(**(vae_config or {}))
        grids = square_grids(scales)
        if grids[-1] != self.vae.layout.grids[0]:
            own = "x".join(map(str, self.vae.layout.grids[0]))
            raise ValueError(f"the last of the scales must be the whole latent, {own}; got {list(scales)}")
        if resize not in ("area", "nearest"):
            raise ValueError(f"resize must be area or nearest; got {resize!r}")
        self.layout = TokenLayout(grids, None, self.vae.layout.dim)

    @classmethod
    def around(
        cls, vae: KLVAE, scales: Sequence[int | Sequence[int]] = SCALES, resize: Resize = "area"
    ) -> LatentPyramid:
        """The scales of a VAE at hand; its weights are shared, not copied."""
        own: Any = vae.config
        config = {k: v for k, v in own.items() if not k.startswith("_")}
        with torch.device("meta"):
            made = cls(config, tuple(scales), resize)
        made.vae = vae
        return cast(LatentPyramid, made.train(vae.training))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.vae.image_size

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L, C): scales of one latent, the posterior's mean or with `rng` a sample."""
        latents = unflatten(self.vae.encode(images, rng), self.layout.grids[-1])
        return pyramid(latents, self.layout.grids, self.config.resize)

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Tokens (B, L, C), or those of the first scales alone, -> images (B, 3, H, W) in [-1, 1].

        Only the last scale given counts; a coarse one is enlarged, bicubic.
        Raises: ValueError on a number of tokens at which no scale ends.
        """
        ends = [s.stop for s in self.layout.slices]
        if tokens.shape[1] not in ends:
            raise ValueError(f"the scales end at {', '.join(map(str, ends))} tokens; got {tokens.shape[1]}")
        scale = ends.index(tokens.shape[1])
        last = tokens[:, self.layout.slices[scale]]
        whole = self.layout.grids[-1]
        if self.layout.grids[scale] != whole:
            last = input_of(unflatten(last, self.layout.grids[scale]), whole, whole)
        return self.vae.decode(last, rng)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> what the generator reads to predict each scale, from the true ones before it."""
        return inputs_of(tokens, self.layout.grids)

    def running(self, batch: int) -> RunningPyramid:
        first = torch.zeros(batch, self.layout.sizes[0], self.layout.dim, device=next(self.parameters()).device)
        return RunningPyramid(self.layout.grids, first)


def _builder(**preset: Any) -> Callable[..., LatentPyramid]:
    return lambda **overrides: cast(LatentPyramid, LatentPyramid(**{**preset, **overrides}))


_TINY = {
    "vae_config": {
        "image_size": 16,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "scales": (1, 2, 4, 8),
}
register_model(
    ModelEntry(
        "latent_pyramid_f16",
        "tokenizer",
        _builder(vae_config=KL16),
        "FlowAR's scales of MAR's KL-VAE at 256x256: 1 to 16, 16 channels",
        tiny=_TINY,
    )
)
register_model(
    ModelEntry(
        "latent_pyramid_fashion",
        "tokenizer",
        _builder(vae_config=FASHION, scales=(1, 2, 4, 8)),
        "scales of the Fashion-MNIST VAE at 32x32: 1 to 8, 4 channels",
        tiny=_TINY,
    )
)
