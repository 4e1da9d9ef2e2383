"""What is asked of a model of clips, checked; what such a model can; and the lines that make the same clip."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from varkit import __version__
from varkit.demo.class_to_image import class_words, labels_for, sample_line
from varkit.demo.clip_files import lengths, read_clip, written, zoom_of
from varkit.demo.common import Models, check_class, check_seed, check_settings, defaults, number, whole
from varkit.demo.controls import RANDOM
from varkit.demo.edit import changed
from varkit.demo.uploads import Upload
from varkit.rng import Rng

FIRST, LAST = "first", "last"
MOST_FPS = 50
"""What a GIF can say."""


# ---- what a model can ---------------------------------------------------------------------------------------------


def counts(pipeline: Any) -> list[int]:
    """How many frames of a clip that is sent can be read; none where tokens are of whole clips alone."""
    found = []
    for count in range(1, pipeline.num_frames):
        with suppress(ValueError):
            pipeline.known_tokens(count)
            found.append(count)
    return found


def frames_range(pipeline: Any, most: int) -> tuple[int, int, int]:
    """The least and the most frames of a clip, and the step between; see `lengths`."""
    possible = counts(pipeline)
    return lengths(pipeline.num_frames, pipeline.default_context() if possible else 0, most)


def has_classes(pipeline: Any) -> bool:
    return pipeline.transformer.condition == "class" and pipeline.transformer.num_classes > 0


def facts(pipeline: Any) -> str:
    """Size, blocks and context of a model, which no control changes."""
    tokenizer = pipeline.image_tokenizer
    (height, width), grid = tokenizer.image_size, tokenizer.layout.grids[-1]
    sizes = [len(group) for group in pipeline.transformer.schedule()]
    named = {grid[-1]: " (a row)", grid[-1] * grid[-2]: " (a frame)"} if len(grid) == 3 and grid[-1] > 1 else {}
    if max(sizes) == 1:
        blocks = f"{len(sizes)} tokens, one after another"
    elif min(sizes) == max(sizes):
        blocks = f"{len(sizes)} blocks of {sizes[0]} tokens{named.get(sizes[0], '')}"
    else:
        blocks = f"{len(sizes)} blocks of {min(sizes)} to {max(sizes)} tokens"
    told = f"{pipeline.num_frames} frames of {width} x {height} pixels at once, in {blocks}. "
    if not counts(pipeline):
        return told + "Its tokens are of whole clips, so none can be continued."
    context = pipeline.default_context()
    return told + f"Longer clips go on from the last {'frame' if context == 1 else f'{context} frames'}."


# ---- a request ----------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A request, checked.

    given: frames that the clip begins with, (1, 3, T, H, W), of a file of `kind`.   read: how many of them the model
    reads.   first: they are the first of the file, and the only ones that are kept.   frames: drawn, those read
    included.
    """

    pipeline: Any
    source: str
    given: Tensor | None
    kind: str
    first: bool
    read: int
    label: int | None
    frames: int
    fps: float
    settings: dict[str, Any]
    seed: int

    @property
    def there(self) -> int:
        """Frames that are given."""
        return 0 if self.given is None else self.given.shape[2]

    @property
    def length(self) -> dict[str, int]:
        """Arguments of the call, where they are not the model's own."""
        long = {"num_frames": self.there - self.read + self.frames} if self.frames > self.pipeline.num_frames else {}
        return long if self.given is None or self.first else {**long, "context_frames": self.read}

    @property
    def classes(self) -> list[int] | None:
        return None if self.label is None else [self.label]

    def call(self, **more: Any) -> Any:
        rng = Rng.from_seed(self.seed, 1)
        return self.pipeline(self.classes, frames=self.given, rng=rng, **self.length, **self.settings, **more)

    @property
    def zoom(self) -> int:
        return zoom_of(*self.pipeline.image_tokenizer.image_size)

    def command(self) -> str:
        """The command line that makes the same file."""
        words = class_words(self.classes) if self.classes else []
        if self.given is not None:
            words += ["--continue", f"clip.{self.kind}", "--given", str(self.there)]
        for name, flag in (("context_frames", "--context"), ("num_frames", "--frames")):
            words += [flag, str(self.length[name])] if name in self.length else []
        words += ["--fps", f"{self.fps:g}", "--zoom", str(self.zoom)]
        default, out = defaults(self.pipeline), f"out.{written()[0]}"
        return sample_line(self.source, words, 1, self.seed, self.settings, default, out)

    def python(self) -> str:
        """Python that makes the same file."""
        zoom = self.zoom
        arguments = [] if self.label is None else [f"class_labels={self.label}"]
        arguments += [] if self.given is None else ["frames=frames"]
        rest = {**self.length, "seed": self.seed, **changed(self.pipeline, self.settings)}
        arguments += [f"{name}={value!r}" for name, value in rest.items()]
        opens = opened = ""
        if self.given is not None:
            opens = "from varkit.data.video import open_videos\n"
            opened = f'frames = open_videos("clip.{self.kind}").clip(0, {self.there})\n'
        return (
            "import numpy as np\n"
            "from varkit import AutoPipeline\n"
            f"{opens}from varkit.data.video_writing import write_video\n\n"
            f"pipeline = AutoPipeline.from_pretrained({self.source!r})\n{opened}"
            f"clip = pipeline({', '.join(arguments)}).videos[0]\n"
            f"pixels = np.stack([np.asarray(frame) for frame in clip]).repeat({zoom}, 1).repeat({zoom}, 2)\n"
            f'write_video(pixels, "out.{written()[0]}", fps={self.fps:g})'
        )

    def record(self) -> dict[str, Any]:
        """The settings that a file carries, as `varkit sample` writes them."""
        given = {} if self.given is None else {"continue": f"clip.{self.kind}", "given": self.there}
        dtype = str(self.pipeline.transformer.dtype).removeprefix("torch.")
        about = {"model": self.source, "seed": self.seed, "dtype": dtype}
        about |= {**self.pipeline.sampler.settings(**self.settings), **self.length, **given, "fps": self.fps}
        return {**about, "version": __version__, "num": 1, "classes": self.classes or []}


def check(models: Models, name: str, upload: Upload | None, *values: Any) -> Asked:
    """Raises ValueError on what cannot be.   values: where, read, class, frames, fps, six sampling settings, seed."""
    pipeline = models.open(name)
    where, read, choice, frames, fps, *sampling, seed = values
    settings, seed = check_settings(pipeline, sampling), check_seed(seed)
    least, most, _ = frames_range(pipeline, models.limits.frames)
    frames = whole("Frames", frames, least, most)
    fps = number("Frames a second", fps, 1, MOST_FPS)
    given, kind, label = None, "", None
    if upload is None:
        read, where = 0, FIRST
        if pipeline.transformer.condition == "frames":
            raise ValueError("this model predicts what follows first frames: upload a clip to be continued")
    else:
        given, kind = read_given(models, pipeline, upload, where, read)
    if has_classes(pipeline) and choice != RANDOM:
        label = check_class(pipeline, choice)
    elif has_classes(pipeline) and given is None:
        (label,) = labels_for(pipeline, RANDOM, Rng.from_seed(seed, 1))
    source, first = models.source(name), where == FIRST
    return Asked(pipeline, source, given, kind, first, int(read), label, frames, fps, settings, seed)


def read_given(models: Models, pipeline: Any, upload: Upload, where: Any, read: Any) -> tuple[Tensor, str]:
    """The frames that a clip begins with, of which the model reads `read`, the first or the last; see `read_clip`."""
    read = check_read(pipeline, where, read)
    size = pipeline.image_tokenizer.image_size
    given, kind = read_clip(upload, size, models.limits, read if where == FIRST else None)
    if given.shape[2] < read:
        raise ValueError(f"the clip has {given.shape[2]} frames, but its last {read} are to be read")
    return given, kind


def check_read(pipeline: Any, where: Any, read: Any) -> int:
    """How many frames the model reads. Raises ValueError."""
    possible = counts(pipeline)
    if not possible:
        raise ValueError("the tokens of this model are of whole clips, so none can be continued; take the clip away")
    if where not in (FIRST, LAST):
        raise ValueError(f"the frames that are read must be the {FIRST} or the {LAST}; got {str(where)[:40]}")
    read = whole("Frames that are read", read, 1, possible[-1])
    if read not in possible:
        raise ValueError(f"{read} frames are no whole tokens of this model; it reads {', '.join(map(str, possible))}")
    return read
