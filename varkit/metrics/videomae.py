"""VideoMAE v2, the network of the content-debiased Frechet video distance (Wang et al., arXiv 2303.16727).

A plain vision transformer on tubes of 2 frames by 14 x 14 pixels. The released network for this distance is ViT-g,
pre-trained without labels and fine-tuned on Something-Something v2 (Ge et al., arXiv 2404.12391).

Source: songweige/content-debiased-fvd: cdfvd/third_party/VideoMAEv2 (a1e037a), whose stochastic depth and weight
scaling concern training and are left out.
Shapes: B batch, T frames, t h w grid of tubes, L = t h w tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.checkpoints.files import load_strictly


@lru_cache(maxsize=4)
def sine_cosine_table(length: int, dim: int) -> Tensor:
    """(length, dim) float32 on the CPU: sines at even, cosines at odd places, wavelengths from 2 pi to 20,000 pi."""
    places = np.arange(dim)
    angles = np.arange(length)[:, None] / np.power(10000.0, 2 * (places // 2) / dim)
    table = np.where(places % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))


class PatchEmbed(nn.Module):
    """Cuts a clip into tubes and projects each: (B, 3, T, H, W) -> (B, L, D)."""

    def __init__(self, patch_size: int, tubelet_size: int, embed_dim: int) -> None:
        super().__init__()
        tube = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, embed_dim, tube, tube)

    def forward(self, clips: Tensor) -> Tensor:
        return self.proj(clips).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention whose queries and values have a bias and whose keys have none."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))  # B L 3 H d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B H L d
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, hidden: int, qkv_bias: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VideoMAE(nn.Module):
    """(B, 3, T, H, W) in [0, 1] -> features (B, D). In eval mode, without gradients. Defaults: the released ViT-g.

    Args:
        img_size: H and W.   patch_size, tubelet_size: pixels and frames of a tube.
        embed_dim: D.   depth, num_heads, mlp_ratio, qkv_bias, layer_norm_eps: of the blocks.
        num_classes: of the head, which the distance does not use.
        all_frames: T at which the positions are used as they are.
        use_mean_pooling: a norm of the mean over tokens; otherwise of the first token.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 14,
        embed_dim: int = 1408,
        depth: int = 40,
        num_heads: int = 16,
        mlp_ratio: float = 48 / 11,
        qkv_bias: bool = True,
        num_classes: int = 174,
        all_frames: int = 16,
        tubelet_size: int = 2,
        use_mean_pooling: bool = True,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if img_size % patch_size or all_frames % tubelet_size or embed_dim % num_heads:
            raise ValueError(
                f"img_size {img_size} must be a multiple of patch_size {patch_size}, all_frames {all_frames} of "
                f"tubelet_size {tubelet_size}, embed_dim {embed_dim} of num_heads {num_heads}"
            )
        self.patch_embed = PatchEmbed(patch_size, tubelet_size, embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden, qkv_bias, layer_norm_eps) for _ in range(depth))
        norm = nn.LayerNorm(embed_dim, layer_norm_eps)
        self.norm: nn.Module = nn.Identity() if use_mean_pooling else norm
        self.fc_norm: nn.Module = norm if use_mean_pooling else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)
        self.img_size, self.tubelet_size, self.embed_dim = img_size, tubelet_size, embed_dim
        self.grid = (all_frames // tubelet_size, img_size // patch_size, img_size // patch_size)  # t h w
        self.use_mean_pooling = use_mean_pooling
        self.eval().requires_grad_(False)

    @classmethod
    def from_official(cls, state: dict[str, Tensor], **constructor: Any) -> Self:
        """From the tensors of `vit_g_hybrid_pt_1200e_ssv2_ft.pth`, 526 of them, which may be on the meta device.

        Args: constructor: of another size than the released one.
        Raises: ValueError listing keys that are missing or unknown, and other shapes.
        """
        with torch.device("meta"):
            model = cls(**constructor)
        load_strictly(model, state, "the VideoMAE file")
        return model.eval().requires_grad_(False)

    def positions(self, frames: int) -> Tensor:
        """(L, D) float32 on the CPU for clips of `frames` frames.

        As released: the table is one of tokens in a row, not of three axes, and for other lengths it is interpolated
        along time with a scale of (t + 0.1) over the usual t.
        """
        t, h, w = self.grid
        table = sine_cosine_table(t * h * w, self.embed_dim)
        steps = frames // self.tubelet_size
        if steps == t:
            return table
        grid = table.T.reshape(1, self.embed_dim, t, h, w)
        scale = ((steps + 0.1) / t, 1.0, 1.0)
        grid = F.interpolate(grid, scale_factor=scale, mode="trilinear", align_corners=False)
        return grid.flatten(2)[0].T

    def forward(self, clips: Tensor, outputs: Sequence[str] = ("features",)) -> dict[str, Tensor]:
        """
        Args:
            clips: (B, 3, T, img_size, img_size), floats in [0, 1]; T a multiple of `tubelet_size`.
            outputs: of `features` and `logits`.
        Returns: `features` (B, D); `logits` (B, num_classes).
        Raises: ValueError for another size, another number of frames, or an unknown output.
        """
        if unknown := set(outputs) - {"logits", "features"}:
            raise ValueError(f"VideoMAE has no output {', '.join(sorted(unknown))}; it has features and logits")
        self._check(clips)
        x = self.patch_embed(clips)
        x = x + self.positions(clips.shape[2]).to(x)
        for block in self.blocks:
            x = block(x)
        features = self.fc_norm(self.norm(x.mean(1) if self.use_mean_pooling else x[:, 0]))
        answers = {"features": features}
        if "logits" in outputs:
            answers["logits"] = self.head(features)
        return {name: answers[name] for name in outputs}

    def _check(self, clips: Tensor) -> None:
        side = self.img_size
        if clips.ndim != 5 or not clips.is_floating_point() or clips.shape[1] != 3 or clips.shape[3:] != (side, side):
            raise ValueError(
                f"VideoMAE takes floats (B, 3, T, {side}, {side}) in [0, 1]; got {clips.dtype} {tuple(clips.shape)}: "
                "resize them first"
            )
        frames = clips.shape[2]
        if frames < self.tubelet_size or frames % self.tubelet_size:
            raise ValueError(
                f"VideoMAE takes frames by the {self.tubelet_size}; got {frames}: give clips of a multiple, usually "
                f"{self.grid[0] * self.tubelet_size}"
            )
