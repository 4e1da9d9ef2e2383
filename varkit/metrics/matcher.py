"""A small image-text matcher, trained on the data it judges: does an image show what its caption says?

Two towers whose unit vectors are near each other where image and text belong together.
Source of the loss: Radford et al., CLIP, arXiv 2103.00020, section 2.3.

Shapes: B images or texts, D width of the shared space, n bytes of the longest text of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Losses


class ImageTextMatcher(HubMixin, ModelMixin, ConfigMixin):
    """Convolutions for images, a transformer over bytes for texts.

    Args:
        image_size: side of the square images.   widths: channels of the stages; the first works at half the size.
        text_width, text_depth, text_heads, text_length: of the transformer; texts are cut to so many bytes, and every
            `text_stride` bytes become one token.
        dim: D.   dropout: of both towers.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        widths: Sequence[int] = (32, 64, 128),
        text_width: int = 128,
        text_depth: int = 2,
        text_heads: int = 4,
        text_length: int = 96,
        text_stride: int = 3,
        dim: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % 2 ** len(widths) or text_length % text_stride:
            raise ValueError(
                f"image_size {image_size} must be a multiple of {2 ** len(widths)} (halved {len(widths)} times), and "
                f"text_length {text_length} one of text_stride {text_stride}"
            )
        self.stages = nn.ModuleList()
        before = 12
        for width in widths:
            layers: list[nn.Module] = []
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.SiLU()]
            self.stages.append(nn.Sequential(*layers))
            before = width
        last = image_size // 2 ** len(widths)
        self.image_head = nn.Sequential(nn.Dropout(dropout), nn.Linear(before * last**2 // 4, dim))
        self.bytes = nn.Embedding(257, text_width, padding_idx=0)  # byte + 1; 0 is padding
        self.joined = nn.Conv1d(text_width, text_width, text_stride, stride=text_stride)
        self.places = nn.Parameter(0.02 * torch.randn(text_length // text_stride, text_width))
        layer = nn.TransformerEncoderLayer(
            text_width, text_heads, 4 * text_width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.text_layers = nn.TransformerEncoder(layer, text_depth, enable_nested_tensor=False)
        self.text_head = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) unit vectors."""
        side = self.config.image_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"this matcher takes (B, 3, {side}, {side}) in [-1, 1]; got {tuple(images.shape)}")
        x = F.pixel_unshuffle(images, 2)
        for i, stage in enumerate(self.stages):
            x = stage(F.avg_pool2d(x, 2) if i else x)
        return F.normalize(self.image_head(F.avg_pool2d(x, 2).flatten(1)), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """B texts, any script -> (B, D) unit vectors."""
        c, device = self.config, self.places.device
        raw = [text.encode()[: c.text_length] for text in texts]
        longest = max([1, *map(len, raw)])
        room = longest + -longest % c.text_stride
        ids = torch.zeros(len(raw), room, dtype=torch.int64)  # B n
        for row, text in zip(ids, raw, strict=True):
            row[: len(text)] = torch.tensor(list(text), dtype=torch.int64) + 1
        ids = ids.to(device)
        real = ids.unflatten(1, (-1, c.text_stride)).amax(2) > 0  # B m
        real[:, 0] = True  # an empty text too has a vector
        x = self.joined(self.bytes(ids).transpose(1, 2)).transpose(1, 2) + self.places[: real.shape[1]]
        x = self.text_layers(x, src_key_padding_mask=~real)
        weight = real[..., None].to(x)
        return F.normalize(self.text_head((x * weight).sum(1) / weight.sum(1)), dim=-1)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Losses:
        """Cross entropy of finding each image's text in the batch, and each text's image, and how often it is found."""
        similar = self.embed_images(images) @ self.embed_texts(texts).T * self.log_scale.clamp(max=math.log(100)).exp()
        mine = torch.arange(len(similar), device=similar.device)
        loss = (F.cross_entropy(similar, mine) + F.cross_entropy(similar.T, mine)) / 2
        return {"loss": loss, "found": (similar.detach().argmax(1) == mine).float().mean()}


def open_matcher(folder: Any) -> ImageTextMatcher:
    """A matcher that a run of the objective `matcher` wrote. Raises ValueError when the folder holds none."""
    try:
        return ImageTextMatcher.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no matcher in {folder}: {first} Train one, as by `varkit train emoji_matcher`, and give its model/ folder"
        ) from None
