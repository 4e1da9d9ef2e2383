"""The first frames of a clip as a condition: for generators that go on with them (`condition` "frames")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varkit.interfaces import Cond, Condition, Tokenizer
from varkit.rng import Rng


class FrameCondition(Condition):
    """Given frames, the last of them repeated to a whole clip, as the ids of a tokenizer of clips.

    Source: hywang66/LARP: sample.py (8aaed63), frame prediction.

    Args: tokenizer: of clips; it makes the ids.
    Raises: ValueError when it codes images, or latents.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.num_frames is None or not isinstance(tokenizer.layout.codebook_size, int):
            raise ValueError(
                f"frames become ids by a tokenizer of clips with a codebook; {type(tokenizer).__name__} codes "
                f"{'images' if tokenizer.num_frames is None else tokenizer.layout.describe()}"
            )
        self.tokenizer, self.num_frames = tokenizer, tokenizer.num_frames

    @torch.no_grad()
    def encode(self, *, frames: Tensor, rng: Rng | None = None, **_: Any) -> Cond:  # type: ignore[override]
        """(B, 3, t, H, W) in [-1, 1], 1 <= t <= num_frames -> `Cond.vector`, ids (B, n) int64.

        Args: rng: by which a stochastic tokenizer draws them, as LARP's sample.py does; None takes the nearest codes,
            which its training read.
        Raises: ValueError for another shape.
        """
        size = self.tokenizer.image_size
        if frames.dim() != 5 or frames.shape[1] != 3 or tuple(frames.shape[3:]) != size:
            raise ValueError(f"frames must be (B, 3, t, {size[0]}, {size[1]}) in [-1, 1]; got {tuple(frames.shape)}")
        if not 1 <= frames.shape[2] <= self.num_frames:
            raise ValueError(f"1 to {self.num_frames} frames can be given; got {frames.shape[2]}")
        rest = self.num_frames - frames.shape[2]
        clips = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, rest, -1, -1)], 2)
        return Cond(self.tokenizer.encode(clips, rng))

    def null(self, like: Cond) -> Cond:
        """Raises ValueError: such models are never trained without frames."""
        raise ValueError(
            "a generator that goes on with given frames knows no absence of them: leave guidance_scale at 1"
        )
