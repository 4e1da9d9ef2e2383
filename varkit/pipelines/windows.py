"""Which first frames a window of a clip begins with, and how many windows a clip is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from varkit.pipelines.base import StepCallback

CONTEXT = 5
"""First frames that LARP and NBP are given to predict a clip of 16 or 17."""


class Window(NamedTuple):
    """One of the windows that make a clip: frames that it begins with, of those that are there; how many it adds."""

    context: int
    added: int


class Windowed:
    """Of pipelines of clips: planning, before any work."""

    @property
    def num_frames(self: Any) -> int:
        """Frames of one window, N."""
        return self.image_tokenizer.num_frames

    @torch.no_grad()
    def known_tokens(self: Any, frames: int) -> int:
        """How many tokens so many first frames determine; 0 for models that are conditioned on the frames.

        Raises: ValueError where they are no whole tokens, or the tokenizer codes a clip as a whole.
        """
        if not 1 <= frames < self.num_frames:
            raise ValueError(
                f"1 to {self.num_frames - 1} frames can be read of a clip of {self.num_frames}; got {frames}"
            )
        if self.transformer.condition == "frames":
            return 0
        counts: dict[int, int | str] = self.__dict__.setdefault("_counts", {})
        if frames not in counts:
            blank = torch.zeros(1, 3, frames, *self.image_tokenizer.image_size, device=self._execution_device)
            try:
                counts[frames] = self.image_tokenizer.encode_start(blank).shape[1]
            except ValueError as error:
                counts[frames] = str(error)
        found = counts[frames]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def default_context(self: Any, given: int | None = None) -> int:
        """The most frames, of 5, half a window and those given, whose tokens can be known.

        Raises: ValueError where none can.
        """
        most = max(1, min(CONTEXT, self.num_frames // 2))
        for count in range(min(most, given or most), 1, -1):
            try:
                self.known_tokens(count)
            except ValueError:
                continue
            return count
        self.known_tokens(1)
        return 1

    def plan(self: Any, given: int, num_frames: int | None, context_frames: int | None) -> list[Window]:
        """The windows of a clip that begins with `given` frames; see `__call__`. Raises ValueError."""
        if given == 0 and self.transformer.condition == "frames":
            raise ValueError(f"this {type(self.transformer).__name__} predicts what follows first frames: give frames=")
        if num_frames is not None and num_frames <= given:
            raise ValueError(f"num_frames counts the given frames too: more than {given} are needed; got {num_frames}")
        first = min(given, context_frames or self._readable(given)) if given else 0
        if first:
            self.known_tokens(first)
        windows = [Window(first, self.num_frames - first)]
        wanted = num_frames or given + windows[0].added
        left = wanted - given - windows[0].added
        if left > 0:
            context = self.default_context() if context_frames is None else context_frames
            self.known_tokens(context)
            each = self.num_frames - context
            windows += [Window(context, each)] * math.ceil(left / each)
        return windows

    def _readable(self: Any, given: int) -> int:
        """All given frames where a window can begin with them, else the default."""
        try:
            self.known_tokens(given)
        except ValueError:
            return self.default_context(given)
        return given


def counted(callback: StepCallback | None, number: int, steps: Sequence[int]) -> StepCallback | None:
    """A callback for one window, which is told the steps of all windows."""
    if callback is None:
        return None
    before, total = sum(steps[:number]), sum(steps)

    def tell(owner: Any, step: int, position: int, values: dict[str, Any]) -> dict[str, Any] | None:
        return callback(owner, before + step, position, {**values, "num_steps": total, "window": number})

    return tell
