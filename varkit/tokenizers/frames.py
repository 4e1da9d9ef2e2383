"""Clips by a tokenizer of images, each frame by itself: tokens of a frame say nothing of the others.

Nothing is learned here. Tokens are as many as all frames have, where a causal tokenizer of clips has fewer.

Shapes: B batch, T frames, L tokens of a clip, n tokens of a frame, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, model_class, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.kl_vae import FASHION
from varkit.tokenizers.vqgan import PRESETS, TINY


class FrameTokenizer(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Clips (B, 3, T, H, W) <-> tokens (B, T n) or (B, T n, C), frame after frame.

    Args:
        frame_class: the class of the tokenizer of images, such as `VQGAN`.
        frame_config: its arguments; its image_size is that of the frames.
        num_frames: T.
    Raises: ValueError for a class that is none, one whose tokens are a pyramid of scales, or fewer than one frame.
    """

    @register_to_config
    def __init__(
        self, frame_class: str = "VQGAN", frame_config: Mapping[str, Any] | None = None, num_frames: int = 16
    ) -> None:
        super().__init__()
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1; got {num_frames}")
        self.frame = model_class(frame_class)(**(frame_config or {}))
        if not isinstance(self.frame, Tokenizer) or self.frame.num_frames is not None:
            raise ValueError(f"frame_class must be a tokenizer of images; got {frame_class}")
        own = self.frame.layout
        if len(own.grids) > 1:
            raise ValueError(
                f"{frame_class} codes a frame by a pyramid of scales ({own.describe()}), which has no order over "
                f"frames; take a tokenizer of one grid, such as VQGAN, TiTok or KLVAE"
            )
        self.num_frames = num_frames
        height, width = own.grids[0] if len(own.grids[0]) == 2 else (1, *own.grids[0])
        self.layout = TokenLayout(((num_frames, height, width),), own.codebook_size, own.dim)

    @classmethod
    def around(cls, tokenizer: Tokenizer, num_frames: int) -> FrameTokenizer:
        """Of a tokenizer at hand; its weights are shared, not copied."""
        own: Any = cast(Any, tokenizer).config
        with torch.device("meta"):
            made = cls(type(tokenizer).__name__, {k: v for k, v in own.items() if not k.startswith("_")}, num_frames)
        made.frame = tokenizer
        return cast(FrameTokenizer, made.train(cast(Any, tokenizer).training))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.frame.image_size

    @property
    def codebook(self) -> Tensor:
        return self.frame.codebook

    def vectors(self, ids: Tensor) -> Tensor:
        return self.frame.vectors(ids)

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, T n) or (B, T n, C). Raises ValueError on another shape."""
        self._check(images)
        if images.shape[2] != self.num_frames:
            raise ValueError(f"clips must have {self.num_frames} frames; got {images.shape[2]}")
        return self._encode(images, rng)

    def encode_start(self, frames: Tensor) -> Tensor:
        """(B, 3, t, H, W), t at most T, -> (B, t n) or (B, t n, C). Raises ValueError on another shape."""
        self._check(frames)
        if not 1 <= frames.shape[2] <= cast(int, self.num_frames):
            raise ValueError(f"the first frames must be 1 to {self.num_frames}; got {frames.shape[2]}")
        return self._encode(frames, None)

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, t n) or (B, t n, C), of all frames or the first t, -> (B, 3, t, H, W). Raises ValueError on another
        number of tokens."""
        each = self.layout.length // cast(int, self.num_frames)
        count, rest = divmod(tokens.shape[1], each)
        if rest or not 1 <= count <= cast(int, self.num_frames):
            raise ValueError(f"got {tokens.shape[1]} tokens; {self.num_frames} frames have {each} each at most")
        images = self.frame.decode(tokens.unflatten(1, (count, each)).flatten(0, 1), self._each_frame(rng, count))
        return images.unflatten(0, (len(tokens), count)).transpose(1, 2)

    def _encode(self, clips: Tensor, rng: Rng | None) -> Tensor:
        tokens = self.frame.encode(clips.transpose(1, 2).flatten(0, 1), self._each_frame(rng, clips.shape[2]))
        return tokens.unflatten(0, (len(clips), clips.shape[2])).flatten(1, 2)

    @staticmethod
    def _each_frame(rng: Rng | None, count: int) -> Rng | None:
        """Random numbers of each frame, (B t): those of a frame depend on its clip and its number."""
        if rng is None:
            return None
        words = rng.bits(torch.arange(count), Draw.FRAME)  # B t 4
        return Rng(((words[..., 0] << 32) | words[..., 1]).flatten())

    def _check(self, clips: Tensor) -> None:
        if clips.dim() != 5 or clips.shape[1] != 3 or tuple(clips.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"clips must be (B, 3, T, {height}, {width}); got {tuple(clips.shape)}")


def _builder(**preset: Any) -> Callable[..., FrameTokenizer]:
    return lambda **overrides: cast(FrameTokenizer, FrameTokenizer(**{**preset, **overrides}))


register_model(
    ModelEntry(
        "frames_vq_fashion",
        "tokenizer",
        _builder(frame_class="VQGAN", frame_config=PRESETS["vq_fashion"][0], num_frames=16),
        "clips of 16 frames of 32x32, each coded by itself as vq_fashion does: 1,024 tokens",
        tiny={"frame_config": {**PRESETS["vq_fashion"][0], **TINY}, "num_frames": 3},
    )
)
_TINY_KL = {**FASHION, "image_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
register_model(
    ModelEntry(
        "frames_kl_fashion",
        "tokenizer",
        _builder(frame_class="KLVAE", frame_config=FASHION, num_frames=16),
        "clips of 16 frames of 32x32, each coded by itself as kl_vae_fashion does: 1,024 latents",
        tiny={"frame_config": _TINY_KL, "num_frames": 3},
    )
)
register_model(
    ModelEntry(
        "frames_kl_sd",
        "tokenizer",
        _builder(
            frame_class="KLVAE",
            frame_config={"image_size": 224, "latent_channels": 4, "scaling_factor": 1.0},
            num_frames=16,
        ),
        "clips of 16 frames of 224x224, each coded by itself by the VAE of Stable Diffusion, latents not scaled",
        tiny={"frame_config": _TINY_KL, "num_frames": 3},
    )
)
