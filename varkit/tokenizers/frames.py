"""Clips by a tokenizer of images, each frame by itself: tokens of a frame say nothing of the others.

Nothing is learned here. Tokens are as many as all frames have, where a causal tokenizer of clips has fewer. Those of a
tokenizer of scales come scale by scale, each of all frames: a clip coarse to fine.

Shapes: B batch, T frames, L tokens of a clip, n tokens of a frame, n_k of those at scale k, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from varkit.hub import HubMixin
from varkit.interfaces import Running, Tokenizer
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, model_class, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.kl_vae import FASHION
from varkit.tokenizers.vqgan import PRESETS, TINY


class RunningFrames:
    """Scales of all frames being sampled: what `FrameTokenizer.embed` computes at once, scale by scale.

    Args:
        each: of the tokenizer of images, of B T frames.   num_frames: T.
    """

    def __init__(self, each: Running, num_frames: int) -> None:
        self.each, self.num_frames = each, num_frames

    def inputs(self, positions: Tensor) -> Tensor:
        return self.each.inputs(positions).unflatten(0, (-1, self.num_frames)).flatten(1, 2)

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        """Args: tokens: (B, T n_k) or (B, T n_k, C), of a whole scale, which is what frames note: not `positions`."""
        self.each.record(tokens.unflatten(1, (self.num_frames, -1)).flatten(0, 1), positions)


class FrameTokenizer(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Clips (B, 3, T, H, W) <-> tokens (B, T n) or (B, T n, C), frame after frame; of scales, scale after scale.

    Args:
        frame_class: the class of the tokenizer of images, such as `VQGAN`.
        frame_config: its arguments; its image_size is that of the frames.
        num_frames: T.
    Raises: ValueError for a class that is none, or fewer than one frame.
    """

    free_arguments = frozenset({"num_frames"})
    """Constructor arguments that weights do not depend on."""

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
        self.num_frames = num_frames
        grids = tuple((num_frames, *(1,) * (2 - len(grid)), *grid) for grid in own.grids)
        self.layout = TokenLayout(grids, own.codebook_size, own.dim)

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
        """(B, 3, t, H, W), t at most T, -> (B, t n) or (B, t n, C), for `start_positions`. Raises ValueError on another
        shape."""
        self._check(frames)
        if not 1 <= frames.shape[2] <= cast(int, self.num_frames):
            raise ValueError(f"the first frames must be 1 to {self.num_frames}; got {frames.shape[2]}")
        return self._encode(frames, None)

    def start_positions(self, count: int) -> Tensor:
        """The first of each scale."""
        frames, scales = self._count(count), zip(self.layout.slices, self._each, strict=True)
        firsts = [torch.arange(whole.start, whole.start + frames * each) for whole, each in scales]
        return torch.cat(firsts)

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, t n) or (B, t n, C), of all frames or the first t, -> (B, 3, t, H, W). Raises ValueError on another
        number of tokens."""
        count = self._count(tokens.shape[1])
        images = self.frame.decode(self._by_frame(tokens, count), self._each_frame(rng, count))
        return images.unflatten(0, (len(tokens), count)).transpose(1, 2)

    def embed(self, tokens: Tensor) -> Tensor:
        """Of scales what the tokenizer of images makes of those of each frame; else as other tokenizers' ids."""
        if len(self._each) == 1:
            return super().embed(tokens)
        frames = cast(int, self.num_frames)
        return self._by_scale(self.frame.embed(self._by_frame(tokens, frames)), frames)

    def running(self, batch: int) -> Running:
        if len(self._each) == 1:
            return super().running(batch)
        frames = cast(int, self.num_frames)
        return RunningFrames(self.frame.running(batch * frames), frames)

    def _encode(self, clips: Tensor, rng: Rng | None) -> Tensor:
        tokens = self.frame.encode(clips.transpose(1, 2).flatten(0, 1), self._each_frame(rng, clips.shape[2]))
        return self._by_scale(tokens, clips.shape[2])

    @property
    def _each(self) -> tuple[int, ...]:
        """Tokens of a frame at each scale, n_k."""
        return self.frame.layout.sizes

    def _count(self, tokens: int) -> int:
        """How many frames so many tokens are. Raises ValueError when they are none, or too many."""
        each = self.frame.layout.length
        count, rest = divmod(tokens, each)
        if rest or not 1 <= count <= cast(int, self.num_frames):
            raise ValueError(f"got {tokens} tokens; {self.num_frames} frames have {each} each at most")
        return count

    def _by_scale(self, tokens: Tensor, frames: int) -> Tensor:
        """(B t, n, ...), a frame a row, -> (B, t n, ...): of each scale all frames."""
        scales = tokens.unflatten(0, (-1, frames)).split(self._each, 2)
        return torch.cat([scale.flatten(1, 2) for scale in scales], 1)

    def _by_frame(self, tokens: Tensor, frames: int) -> Tensor:
        """What `_by_scale` made, undone."""
        scales = tokens.split([frames * n for n in self._each], 1)
        return torch.cat([scale.unflatten(1, (frames, -1)) for scale in scales], 2).flatten(0, 1)

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
