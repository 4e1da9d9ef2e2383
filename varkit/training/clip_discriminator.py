"""Discriminators of clips: a transformer of 3-D patches, and any network of images, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varkit.layers.vit import Block
from varkit.tokenizers.larp import BLOCK_EPS, clip_positions


class ClipDiscriminator(nn.Module):
    """A ViT over patches of frames and pixels, one logit a patch: no batch statistics, all patches see all others.

    Its sizes are those of hywang66/LARP: scripts/train_larp_tokenizer_reproduce.sh (8aaed63); that each patch has a
    logit of its own, and fixed positions, is our choice.

    Args:
        clip: frames, height and width.   patch: of the same.   size: width, layers and heads.
    Raises: ValueError when patches do not fill a clip, or heads the width.
    """

    positions: Tensor  # 1 P D

    def __init__(self, clip: Sequence[int], patch: Sequence[int], size: Sequence[int]) -> None:
        super().__init__()
        width, depth, heads = size
        if any(side % step for side, step in zip(clip, patch, strict=True)):
            raise ValueError(f"patches of {tuple(patch)} do not fill a clip of {tuple(clip)}")
        if width % heads or width % 4:
            raise ValueError(f"the width {width} must be a multiple of its {heads} heads and of 4")
        grid = [side // step for side, step in zip(clip, patch, strict=True)]
        self.embed = nn.Conv3d(3, width, tuple(patch), stride=tuple(patch))
        self.register_buffer("positions", clip_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 0.0, 0.0, BLOCK_EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(width, BLOCK_EPS)
        self.head = nn.Linear(width, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, P) logits; positive means real."""
        x = self.embed(clips).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., 0]


class PerFrame(nn.Module):
    """A network of images that is given clips: all frames at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) each -> what the network gives for the B * T frames."""
        return self.network(*[clip.transpose(1, 2).flatten(0, 1) for clip in clips])


def shown_frames(clips: Tensor, count: int) -> Tensor:
    """(B, 3, T, H, W) -> (B * count, 3, H, W): of each clip the first frame, the last, and others evenly between."""
    which = torch.linspace(0, clips.shape[2] - 1, count).round().long().to(clips.device)
    return clips[:, :, which].transpose(1, 2).flatten(0, 1)
