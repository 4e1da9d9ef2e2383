"""What `varkit sample` does with a model of clips: one clip, clips side by side, film strips, files, an archive."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit import __version__
from varkit.commands.common import say

FORMATS = ("mp4", "gif", "webp", "webm", "mov", "mkv", "avi")
ENDINGS = tuple(f".{name}" for name in FORMATS)
MOST_GIVEN = 1024
"""Frames of a clip that is continued: they are held in memory at their own size."""
IMAGES_ONLY = (
    "prompt",
    "features",
    "negative_prompt",
    "image",
    "mask",
    "box",
    "keep",
    "extend",
    "strength",
    "threshold",
    "fit",
    "paste_back",
    "feather",
    "size",
    "control",
    "control_strength",
    "extract",
    "tokens",
    "best_of",
    "classifier",
    "accept",
    "teacher_start",
)
"""Options that clips have no use for."""
CLIPS_ONLY = ("fps", "frames", "continued", "given", "context_frames", "file_format")

Fps = Annotated[float, typer.Option(help="Of a model of clips: frames a second of what is written.")]
NumFrames = Annotated[
    int | None,
    typer.Option(
        "--frames", min=1, help="... frames of a clip; more than the model draws at once is drawn in windows."
    ),
]
Continued = Annotated[
    Path | None,
    typer.Option("--continue", help="... go on from this clip: a video, an image, a folder of frames."),
]
Given = Annotated[
    int | None, typer.Option(min=1, help="With --continue: its first so many frames are given. Default: all.")
]
Context = Annotated[
    int | None, typer.Option("--context", min=1, help="... how many of the last frames there are a window begins with.")
]
Format = Annotated[
    str | None, typer.Option("--format", help=f"... of the files in a FOLDER/: {', '.join(FORMATS)}. Default: mp4.")
]


def draws_clips(pipeline: Any, name: str, context: typer.Context, out: Path) -> bool:
    """Whether the model draws clips. Raises ValueError on typed options that it has no use for."""
    clips = getattr(pipeline.image_tokenizer, "num_frames", None) is not None
    names, why = (IMAGES_ONLY, "images") if clips else (CLIPS_ONLY, "clips")
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            option = next(o for o in parameter.opts if o.startswith("--"))
            raise ValueError(f"{option} is of {why}; {name} draws {'clips' if clips else 'images'} (docs/video.md)")
    if out.suffix in ENDINGS and not clips:
        raise ValueError(f"--out {out} is a clip; {name} draws images: .png, .npz or a folder")
    return clips


def first_frames(path: Path, given: int | None) -> Any:
    """uint8 (T, H, W, 3) of a clip's first frames, or of all. Raises ValueError, FileNotFoundError."""
    import numpy as np

    from varkit.data.images import EXTENSIONS
    from varkit.data.video import FrameFolder, open_videos

    if path.is_file() and path.suffix.lower() in EXTENSIONS and path.suffix.lower() != ".webp":
        from varkit.data.transforms import to_rgb
        from varkit.pipelines.canvas import open_image

        return np.asarray(to_rgb(open_image(path)))[None]
    names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else []
    if names:
        video: Any = FrameFolder(path, names)
    else:
        found = open_videos(path)
        if len(found) != 1:
            raise ValueError(f"--continue {path} holds {len(found)} videos; give one")
        video = found.videos[0]
    there = video.info().frames
    if given is not None and given > there:
        raise ValueError(f"--given {given}: {path} has {there} frames")
    if given is None and there > MOST_GIVEN:
        raise ValueError(f"{path} has {there:,} frames; say with --given how many of the first are to be continued")
    return video.read(given or there, 1, 0)


class ClipCommand:
    """What is drawn and written.

    Args: typed: values of the options, by the names of `sample`.
    Raises: ValueError, FileNotFoundError on what cannot be, before any work.
    """

    def __init__(self, pipeline: Any, name: str, typed: dict[str, Any]) -> None:
        self.pipeline, self.name, self.out = pipeline, name, typed["out"]
        self.fps, self.zoom, self.seed = typed["fps"], typed["zoom"], typed["seed"]
        self.format = typed["file_format"] or "mp4"
        if self.format not in FORMATS:
            raise ValueError(f"--format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        if typed["file_format"] and self.out.suffix:
            raise ValueError(f"--format is of the files in a folder; {self.out} names its own")
        if typed["continued"] is None and self._of_frames:
            raise ValueError(f"{name} predicts what follows first frames: give --continue CLIP")
        if typed["given"] and typed["continued"] is None:
            raise ValueError("--given goes with --continue CLIP")
        ending = self.out.suffix or f".{self.format}"
        if ending in ENDINGS:
            check_writable(ending, self.fps)
        self.how = {"num_frames": typed["frames"], "context_frames": typed["context_frames"]}
        self.record: dict[str, Any] = {k: v for k, v in self.how.items() if v is not None}
        self.how["frames"] = None
        if typed["continued"] is not None:
            self.how["frames"] = first_frames(typed["continued"], typed["given"])
            self.record |= {"continue": typed["continued"].name, "given": len(self.how["frames"])}
        self.ids = self._ids(typed["classes"])
        self.num = typed["num"] or len(self.ids)
        begun = 0 if self.how["frames"] is None else len(self.how["frames"])
        windows = pipeline.plan(begun, typed["frames"], typed["context_frames"])
        self.length = typed["frames"] or begun + windows[0].added

    @property
    def _of_frames(self) -> bool:
        return self.pipeline.transformer.condition == "frames"

    def _ids(self, classes: str | None) -> list[int | None]:
        """Classes in turn; [None] where there are none, or first frames say what is drawn."""
        from varkit.conditioning.label import LabelCondition

        count = getattr(self.pipeline.transformer, "num_classes", None) or 0
        if self._of_frames or not count:
            if classes is not None:
                raise ValueError(f"{self.name} knows no classes: leave --class out")
            return [None]
        if classes is None:
            return [None] if self.how["frames"] is not None else list(range(count))
        labels = self.pipeline.label_ids(self.pipeline.split_labels(classes))
        LabelCondition(count).encode(class_labels=labels)
        return list(labels)

    # ---- drawing ----------------------------------------------------------------------------------------------

    def run(self, given: dict[str, Any], settings: dict[str, Any], how: dict[str, Any], batch_size: int) -> Any:
        """Draw and write. Returns files, classes, seconds, settings.

        Args: given: of the sampler, as the call takes them.   settings, how: for the record.
        """
        from tqdm import tqdm

        from varkit.pipelines.clips import generate_clips

        record = {"model": self.name, "seed": self.seed, **how, **settings, **self.record, "fps": self.fps}
        record["version"] = __version__
        guidance = f"guidance {settings['guidance_scale']:g} ({settings['guidance_schedule']})"
        where = f"{how['dtype']} on {self.pipeline.device}"
        say(f"{self.name}: {self.num} clips of {self.length} frames, seed {self.seed}, {guidance}, {where}")
        began, batch = time.perf_counter(), min(batch_size, self.num)
        with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:

            def told(owner: Any, step: int, position: int, values: dict[str, Any]) -> None:
                bar.total = values["num_steps"] * -(-self.num // batch)
                bar.set_postfix(window=values["window"] + 1, refresh=False)
                bar.update()

            made = generate_clips(
                self.pipeline,
                self.ids,
                self.num,
                self.seed,
                batch,
                callback_on_step_end=told,
                **self.how,
                **given,
            )
            files, labels = self.write(made, record)
        return files, labels, time.perf_counter() - began, record

    def write(self, made: Iterator[tuple[int, Any, Any]], record: dict[str, Any]) -> tuple[list[Path], list[Any]]:
        """The clips as files: which, and the class of each clip."""
        import numpy as np

        from varkit import pictures
        from varkit.data.video_writing import write_video

        clips, labels, files = list[Any](), list[Any](), list[Path]()
        for index, label, frames in made:
            if self.out.suffix == "":  # a folder: written as they come, so a long run loses nothing
                files.append(self.out / f"{index:06d}.{self.format}")
                about = {**record, "index": index, **({} if label is None else {"class": label})}
                write_video(self.zoomed(frames), files[-1], self.fps, about)
            else:
                clips.append(frames)
            labels.append(label)
        if self.out.suffix:
            files = [self.out]
        about = {**record, "num": self.num, "classes": [i for i in self.ids if i is not None]}
        if self.out.suffix == ".npz":
            pixels = [np.stack([np.asarray(frame) for frame in clip]) for clip in clips]
            pictures.save_npz(pixels, [-1 if label is None else label for label in labels], self.out)
        elif self.out.suffix == ".png":
            strip = pictures.grid([frame for clip in clips for frame in clip], self.length, self.zoom)
            pictures.save_png(strip, self.out, about)
        elif self.out.suffix:
            shown = self.zoomed(clips[0]) if self.num == 1 else self.side_by_side(clips, labels)
            write_video(shown, self.out, self.fps, about)
        return files, labels

    def zoomed(self, frames: Sequence[Any]) -> Any:
        """uint8 (T, H, W, 3), each pixel drawn `zoom` times."""
        import numpy as np

        return np.stack([np.asarray(f) for f in frames]).repeat(self.zoom, 1).repeat(self.zoom, 2)

    def side_by_side(self, clips: Sequence[Sequence[Any]], labels: Sequence[Any]) -> Any:
        """All clips at once, each with its class below: uint8 (T, H, W, 3)."""
        import numpy as np

        from varkit import pictures

        names = self.pipeline.labels
        titles = [str(i) if label is None else names.get(label, str(label)) for i, label in enumerate(labels)]
        columns = pictures.columns_for(self.num, len(self.ids))
        sheets = pictures.titled_grids(clips, titles, columns, self.zoom)
        return np.stack([np.asarray(sheet) for sheet in sheets])


def check_writable(ending: str, fps: float) -> None:
    """Raises ValueError for a rate that the format cannot say; ImportError without PyAV."""
    import numpy as np

    from varkit.data.video_writing import check_video

    check_video(np.zeros((1, 2, 2, 3), np.uint8), Path(f"clip{ending}"), fps)


def sample_clips(
    pipeline: Any,
    name: str,
    typed: dict[str, Any],
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """`varkit sample` of a model of clips.

    Args: typed: values of its options.   given: those of the sampler, as the pipeline's call takes them.
    """
    command = ClipCommand(pipeline, name, typed)
    batch, steps = min(typed["batch_size"], command.num), typed["steps"]
    chosen = pipeline.choose_sampler(typed["sampler"], batch)
    settings = chosen.settings(**pipeline.check_settings({**given, "num_steps": steps}, chosen))
    how = {"dtype": typed["dtype"], **({"sampler": typed["sampler"]} if typed["sampler"] else {})}
    asked = {**given, "sampler": chosen, "num_inference_steps": steps}
    files, labels, seconds, record = command.run(asked, settings, how, typed["batch_size"])
    if as_json:
        told = {"files": [str(f) for f in files], "classes": labels, "seconds": seconds, "settings": record}
        typer.echo(json.dumps(told))
        return
    what = command.out if command.out.suffix else f"{len(files)} clips in {command.out}/"
    typer.echo(f"wrote {what} in {seconds:.1f} s ({seconds / command.num:.2f} s a clip)")
