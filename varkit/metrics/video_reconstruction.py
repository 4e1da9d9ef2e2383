"""Videos through a tokenizer of clips and back: beside their originals as a file, with PSNR and SSIM of each frame.

A tokenizer codes clips of so many frames. A longer video goes through it window by window, each coded by itself; what
lacks at the end of the last window is its last frame, repeated, and is cut off again.

Shapes: T frames of a video, N frames of a window, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varkit.data.clips import CLIP_DATASETS, open_clips
from varkit.data.transforms import ImageTransform
from varkit.data.video import ShortVideo, VideoSet
from varkit.data.video_writing import WRITERS, write_video
from varkit.metrics.reconstruction import CodebookUse, ReconstructionMetrics
from varkit.pictures import to_uint8
from varkit.pipelines.auto import best_device

FORMATS = (*(ending[1:] for ending in WRITERS), "webp")
DEFAULT_RATE = 8.0
"""Frames a second of what is written where nothing says how many the video has."""


class Window(NamedTuple):
    """frames: uint8 (N, h, w, 3), the last `padded` of them repeat the one before."""

    frames: Tensor
    padded: int


def windows(videos: VideoSet, index: int, size: int, stride: int = 1, most: int | None = None) -> Iterator[Window]:
    """A video cut into windows of `size` frames; the whole of it, or its first `most` frames.

    Raises: ValueError for a video that cannot be read, or has no frames.
    """
    start = 0
    while True:
        there = -(-videos.num_frames(index) // stride)
        there = there if most is None else min(there, most)
        if not there:
            raise ValueError(f"{videos.names[index]} has no frames")
        if start >= there:
            return
        count = min(size, there - start)
        try:
            frames = videos.clip(index, count, stride, start * stride)
        except ShortVideo:  # the header said too much, and is now set right
            continue
        rest = frames[-1:].expand(size - count, -1, -1, -1)
        yield Window(torch.cat([frames, rest]), size - count)
        start += count


@torch.no_grad()
def reconstruct_videos(
    tokenizer: Any,
    source: str,
    out: Path,
    *,
    num: int = 8,
    mode: str = "center",
    split: str | None = None,
    root: str | None = None,
    device: str = "auto",
    frames: int | None = None,
    stride: int = 1,
    file_format: str = "mp4",
) -> dict[str, Any]:
    """Write `out`/NAME.mp4, original and reconstruction side by side, of the first `num` videos, and metrics.json.

    Args:
        source: as `open_clips`; of a named set `split` is the test split unless given.
        frames: of each video at most; None is all.   stride: every which frame is read.
        mode: how frames come to the tokenizer's size.   file_format: one of `FORMATS`.
    Returns: means over all frames, and `videos`: of each its name, frames, windows, repeated frames, psnr and ssim of
        each frame. Where SSIM needs larger frames it is not there.
    Raises: FileNotFoundError and ValueError before any work; ValueError for a video that cannot be read.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {file_format!r}")
    if min(num, stride, 1 if frames is None else frames) < 1:
        raise ValueError(f"num, frames and stride count from 1; got {num}, {frames} and {stride}")
    named = source in CLIP_DATASETS
    dataset = open_clips(source, split=split or ("test" if named else "train"), root=root, frames=1)
    transform = ImageTransform(tokenizer.image_size, mode=mode, enlarge=1.0)  # type: ignore[arg-type]
    if named:
        dataset.set_clips(dataset.rule, None, transform)
    where = best_device() if device == "auto" else torch.device(device)
    tokenizer.eval().to(where)
    metrics, report = ReconstructionMetrics(), []
    use = None if tokenizer.layout.codebook_size is None else CodebookUse(tokenizer.layout)
    for index in range(min(num, len(dataset))):
        video = _Video(dataset.videos.names[index])
        for window in windows(dataset.videos, index, tokenizer.num_frames, stride, frames):
            video.add(tokenizer, transform, window, where, use)
        metrics.merge(video.metrics)
        file = out / f"{index:03d}-{_short(video.name)}.{file_format}"
        rate = (dataset.videos.rate(index) or DEFAULT_RATE * stride) / stride
        write_video(torch.cat(video.pairs), file, min(rate, 50.0) if file_format == "gif" else rate)
        report.append({**video.facts(), "file": file.name})
    means = metrics.means()
    result = {"tokenizer_frames": tokenizer.num_frames, "frames": means.pop("images"), **means, "videos": report}
    result |= {} if use is None else use.compute()
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


class _Video:
    """One video on its way: its scores, and frames of original and reconstruction side by side."""

    def __init__(self, name: str) -> None:
        self.name, self.metrics = name, ReconstructionMetrics()
        self.pairs: list[Tensor] = []  # uint8 (n, H, 2 W, 3)
        self.repeated = 0

    def add(
        self, tokenizer: Any, transform: ImageTransform, window: Window, where: torch.device, use: CodebookUse | None
    ) -> None:
        kept = len(window.frames) - window.padded
        keys = torch.zeros(len(window.frames), dtype=torch.int64)
        original = transform(window.frames.permute(0, 3, 1, 2), keys)  # N 3 H W
        tokens = tokenizer.encode(original.transpose(0, 1)[None].to(where))
        if use is not None:
            use.update(tokens)
        back = tokenizer.decode(tokens)[0].float().clamp(-1, 1).transpose(0, 1).cpu()
        original, back = original[:kept], back[:kept]
        self.metrics.update(back, original)
        self.pairs.append(to_uint8(torch.cat([original, back], -1)).permute(0, 2, 3, 1))
        self.repeated += window.padded

    def facts(self) -> dict[str, Any]:
        found = self.metrics.compute()
        scores = {name: [round(v, 4) for v in values.tolist()] for name, values in found["per_image"].items()}
        counts = {"frames": found["images"], "windows": len(self.pairs), "repeated": self.repeated}
        return {"name": self.name, **counts, **{name: found[name] for name in scores}, "per_frame": scores}


def _short(name: str) -> str:
    """A video's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)[:60]


def told(result: dict[str, Any]) -> list[str]:
    """What was done, for people: a line a video."""
    lines = []
    for one in result["videos"]:
        cut = f", the last padded by {one['repeated']} repeated frames, cut off again" if one["repeated"] else ""
        many = "window" if one["windows"] == 1 else "windows"
        ssim = f", SSIM {one['ssim']:.4f}" if "ssim" in one else ""
        lines.append(
            f"{one['name']}: {one['frames']} frames in {one['windows']} {many} of {result['tokenizer_frames']}{cut}: "
            f"PSNR {one['psnr']:.2f} dB{ssim} -> {one['file']}"
        )
    return lines
