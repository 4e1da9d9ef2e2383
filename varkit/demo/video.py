"""The tab "Video": clips of a class, and clips that go on from one that a visitor sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from varkit.demo.clip_files import FORMATS, readable, saved, written
from varkit.demo.clip_request import (
    FIRST,
    LAST,
    MOST_FPS,
    check,
    counts,
    facts,
    frames_range,
    has_classes,
    read_given,
)
from varkit.demo.common import (
    SETTINGS,
    Models,
    class_choices,
    enlarge,
    need_gradio,
    readable_errors,
    setting_updates,
)
from varkit.demo.controls import (
    HIDDEN,
    NETWORK,
    RANDOM,
    RAW,
    buttons,
    code,
    gallery,
    note,
    seed_controls,
    setting_controls,
    wire,
    wire_model,
)
from varkit.demo.files import keeping
from varkit.demo.running import Step, run
from varkit.demo.uploads import Upload
from varkit.pipelines.clips import clips_as_output

FPS = 8
"""As `varkit sample` writes clips."""
ANY = "Any: the seed chooses it, or the clip that goes on says it"


def generate(models: Models, folder: str, name: str, upload: Upload | None, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Yields (clip, a file for each of `written()`, status, command, Python lines) as the run proceeds.

    Args: folder: where gradio keeps files.   values: see `check`.
    """
    with readable_errors():
        gr = need_gradio()
        asked = check(models, name, upload, *values)
        lines = asked.command(), asked.python()
        yield None, *[gr.update(value=None, interactive=False) for _ in written()], "Starting ...", *lines
        for event in run(models.turns, asked.call, {}):
            if isinstance(event, Step):
                yield *[gr.skip() for _ in ("clip", *written())], f"Block {event.number} of {event.total} ...", *lines
                continue
            (frames,) = event.result.videos
            files = saved(frames, asked.zoom, asked.fps, asked.record(), folder)
            told = status(event.result, event.seconds, asked.pipeline.device.type)
            yield files[0], *[gr.update(value=file, interactive=True) for file in files], told, *lines


def status(result: Any, seconds: float, device: str) -> str:
    """One line: what was made, how long it took, in how many blocks."""
    (frames,), stats = result.videos, result.stats
    windows = "1 window" if stats["windows"] == 1 else f"{stats['windows']} windows"
    width, height = frames[0].size
    return (
        f"**{len(frames)} frames** of {width} x {height} pixels in **{seconds:.2f} s** · {windows} · "
        f"{stats['steps']} blocks · {stats['network_calls']} network passes · {device}"
    )


# ---- the page -----------------------------------------------------------------------------------------------------


def preview(models: Models, name: str, upload: Upload | None, where: Any, read: Any) -> list[Any]:
    """The frames that the model reads, as it sees them."""
    with readable_errors():
        if upload is None:
            return []
        given, _ = read_given(models, models.open(name), upload, where, read)
        shown = given[:, :, :read] if where == FIRST else given[:, :, -read:]
        return [enlarge(frame) for frame in clips_as_output(shown.mul(0.5).add(0.5), "pil")[0]]


def properties(models: Models, name: str) -> dict[str, dict[str, Any]]:
    """Of the controls that depend on the model."""
    pipeline = models.open(name)
    possible = counts(pipeline)
    least, most, step = frames_range(pipeline, models.limits.frames)
    of_frames = pipeline.transformer.condition == "frames"
    return {
        "facts": {"value": facts(pipeline)},
        "class": {
            "choices": [("Any", RANDOM), *class_choices(pipeline)],
            "value": RANDOM,
            "visible": has_classes(pipeline),
        },
        "frames": {
            "minimum": least,
            "maximum": max(most, least + step),  # gradio knows no slider of one value, not even an unseen one
            "step": step,
            "value": least,
            "visible": most > least,
        },
        "box": {"visible": bool(possible), "open": of_frames},
        "read": {"choices": possible, "value": pipeline.default_context() if possible else None},
    }


def settings_of(pipeline: Any) -> list[dict[str, Any]]:
    """As `setting_updates`: without classes nothing is guided, and models of clips read ids, not blends of codes."""
    updates = dict(zip(SETTINGS, setting_updates(pipeline), strict=True))
    updates["guidance_scale"]["visible"] = has_classes(pipeline)
    updates["more_smooth"]["visible"] = False
    return list(updates.values())


def refresh(models: Models, name: str, upload: Upload | None, where: Any) -> list[Any]:
    """Updates of facts, class, frames, box, upload, frames read, their preview and sampling controls for a model."""
    with readable_errors():
        gr = need_gradio()
        about, pipeline, shown = properties(models, name), models.open(name), list[Any]()
        possible, read = about["read"]["choices"], about["read"]["value"]
        with suppress(gr.Error):  # said already when the clip was sent
            shown = preview(models, name, upload, where, read) if possible else []
        return [
            *(gr.update(**about[key]) for key in ("facts", "class", "frames", "box")),
            gr.skip() if possible else None,
            gr.update(**about["read"]),
            shown,
            *(gr.update(**u) for u in settings_of(pipeline)),
        ]


def upload_controls(about: dict[str, dict[str, Any]]) -> tuple[Any, list[Any], Any]:
    """The accordion; the file box, first or last, and how many frames; and the gallery of these."""
    gr = need_gradio()
    with gr.Accordion("Continue a clip", elem_id="video-box", **about["box"]) as box:
        kinds = readable()
        upload = gr.File(
            label=", ".join(FORMATS[kind] for kind in kinds),
            file_types=[f".{kind}" for kind in kinds],
            height=150,
            elem_id="video-upload",
        )
        where = gr.Radio(
            [("its first frames", FIRST), ("its last frames", LAST)],
            value=FIRST,
            label="The clip goes on from",
            elem_id="video-where",
        )
        read = gr.Dropdown(
            label="Frames read", info="As many as make whole tokens", elem_id="video-count", **about["read"]
        )
        shown = gallery("Frames read", "video-read", 5, allow_preview=False)
    return box, [upload, where, read], shown


def player() -> Any:
    """A box that plays what `written()` names first."""
    gr, usual = need_gradio(), {"show_label": False, "interactive": False, "elem_id": "video-clip", "buttons": []}
    if written()[0] == "mp4":
        return gr.Video(label="Clip", autoplay=True, loop=True, **usual)
    return gr.Image(label="Clip", type="filepath", format="webp", **usual)


def add_tab(models: Models) -> None:
    """Build the tab inside the open `gr.Tabs`.   models: those of clips."""
    gr, first = need_gradio(), models.names[0]
    about = properties(models, first)
    with gr.Tab("Video", id="video"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(models.names, value=first, label="Model of clips", elem_id="video-model")
            told = note(about["facts"]["value"], "video-facts")
            picker = gr.Dropdown(label="Class", info=ANY, elem_id="video-class", **about["class"])
            frames = gr.Slider(label="Frames", elem_id="video-frames", **about["frames"])
            fps = gr.Slider(1, MOST_FPS, FPS, step=1, label="Frames a second", elem_id="video-fps")
            box, sent, shown = upload_controls(about)
            settings = setting_controls(models.open(first))
            for control, update in zip(settings, settings_of(models.open(first)), strict=True):
                control.visible = update.get("visible", True)
            seed = seed_controls()
            start_stop = buttons("Generate", "video")
        with gr.Column(scale=5, min_width=320):
            clip = player()
            line = note("Choose a class, or upload a clip, and press **Generate**.", "video-status")
            with gr.Row():
                files = [
                    gr.DownloadButton(
                        f"Download {FORMATS[kind]}",
                        size="sm",
                        min_width=120,
                        interactive=False,
                        elem_id=f"video-download-{kind}",
                    )
                    for kind in written()
                ]
            lines = code("The same from the command line; what you sent is called clip", "video-command")
            python = code("The same in Python", "video-snippet", "python")
    wire(
        start_stop,
        partial(generate, models, files[0].GRADIO_CACHE),
        [model, *sent, picker, frames, fps, *settings, seed],
        [clip, *files, line, lines, python],
        name="video",
        status=line,
        **RAW,
    )
    upload, where, read = sent
    look = (keeping(partial(preview, models), shown.GRADIO_CACHE), [model, *sent], shown)
    for changed in sent:
        changed.change(*look, trigger_mode="always_last", **RAW, **NETWORK, **HIDDEN)
    fresh = keeping(partial(refresh, models), shown.GRADIO_CACHE)
    wire_model(model, fresh, [told, picker, frames, box, upload, read, shown, *settings], [model, upload, where], **RAW)
