"""`varkit sample`: images of classes or texts, as a grid, single files or an archive."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit import __version__
from varkit.commands import editing, steering, video
from varkit.commands.common import Device, Dtype, Json, numbers, open_pipeline, refusing, say
from varkit.commands.features import features_of


@refusing
def sample(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A shipped model, a saved folder, a checkpoint or a hub repository.")],
    classes: Annotated[
        str | None, typer.Option("--class", help="Class ids or names, separated by commas; cycled. Default: all.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw, for a model of texts. Repeatable; cycled.")
    ] = None,
    features: Annotated[
        list[Path] | None,
        typer.Option(
            help="Features made before: a file a caption (.npy, .safetensors), repeatable, instead of --prompt; or a "
            "folder of `varkit features` that holds those of each --prompt."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Images in all. Default: one a class or prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Names the set of images; image i is the same at any --num.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="uncond + w (cond - uncond); 1 is off.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", "--guidance-schedule", help="Guidance over steps: constant, linear, cosine, late, ..."
        ),
    ] = None,
    guidance_power: Annotated[
        float | None, typer.Option(help="Of schedule power-cosine: the larger, the later guidance sets in.")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="First and last guided step, from 0: 0,99. Default: all.")
    ] = None,
    guidance_times: Annotated[
        str | None, typer.Option(help="Of a model with a flow: lowest and highest guided time, 1 is noise: 0,0.9.")
    ] = None,
    guidance_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a model of latents: the unconditional branch in each k-th step of the head; 1 is exact.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps, where the model can take several.")] = None,
    head_steps: Annotated[
        str | None,
        typer.Option(
            help="Of a model of latents: steps of its flow or diffusion; 50,5: from the first group to the last."
        ),
    ] = None,
    head_steps_last: Annotated[
        int | None, typer.Option(min=1, help="Those of the last group, as the second number of --head-steps.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Of the head: euler, heun, euler-jump, sde; of a diffusion ancestral, ddim.")
    ] = None,
    order: Annotated[str | None, typer.Option(help="Of the tokens, where the model can take any: raster, ...")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 sharper, above 1 flatter.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of mass p; 1 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than p times the best.")] = None,
    teacher_start: Annotated[
        int | None, typer.Option(min=0, help="Of a distilled model that has its teacher: what it draws anew from.")
    ] = None,
    more_smooth: Annotated[bool | None, typer.Option(help="Blend codes: smoother pictures, worse statistics.")] = None,
    image: editing.ImageFile = None,
    mask: editing.MaskFile = None,
    box: editing.BoxText = None,
    keep: editing.Keep = "outside",
    extend: editing.Extend = None,
    strength: editing.Strength = None,
    threshold: editing.Threshold = None,
    fit: editing.FitName = None,
    paste_back: editing.PasteBack = False,
    feather: editing.Feather = None,
    size: editing.Size = None,
    control: steering.ControlFiles = None,
    control_strength: steering.ControlStrength = None,
    extract: steering.Extract = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop after the first so many tokens.")] = None,
    best_of: Annotated[
        int, typer.Option(min=1, help="Draw so many candidates of each image and keep the one --classifier likes best.")
    ] = 1,
    classifier: Annotated[
        str | None, typer.Option(help="Who chooses: a classifier's folder, or a model that has one: fashion-var.")
    ] = None,
    accept: Annotated[
        float | None, typer.Option(help="With --best-of: a probability of the class that is enough; draw no further.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="How tokens are decided: plain, auto, sjd, sjd:window=8, zipar:window=4, cspd, ... Default: own."
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A smaller model of the same tokens, for --sampler cspd (MAR) or little.")
    ] = None,
    fps: video.Fps = 8.0,
    frames: video.NumFrames = None,
    continued: video.Continued = None,
    given: video.Given = None,
    context_frames: video.Context = None,
    file_format: video.Format = None,
    out: Annotated[
        Path,
        typer.Option(
            help="FILE.png: a grid, of clips a film strip each; FOLDER/: single files; FILE.npz: ADM layout; clips "
            "also as .mp4, .gif, .webp, .webm."
        ),
    ] = Path("grid.png"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 16,
    zoom: Annotated[int, typer.Option(min=1, max=16, help="Draw each pixel this often in a grid.")] = 1,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Prepare decoding: weights repacked (CPU), CUDA graphs (GPU).")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Generate images or clips. Each carries its settings in the file's metadata."""
    if out.suffix not in (".png", ".npz", "", *video.ENDINGS):
        raise ValueError(
            f"--out {out} must end in .png (a grid), .npz, or be a folder; of clips {', '.join(video.ENDINGS)}"
        )
    from varkit.pipelines.base import generate, speculation, told
    from varkit.samplers.speculative.names import with_draft

    pipeline = open_pipeline(name, device, dtype)
    if optimize:
        pipeline.optimize_decoding()
    draws_clips = video.draws_clips(pipeline, name, context, out)
    first, last = head_steps_of(head_steps, head_steps_last)
    asked = {
        "guidance_scale": guidance,
        "guidance_schedule": schedule,
        "guidance_power": guidance_power,
        "guidance_interval": numbers(guidance_interval, "--guidance-interval", int) or None,
        "guidance_times": numbers(guidance_times, "--guidance-times", float) or None,
        "guidance_every": guidance_every,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "teacher_start": teacher_start,
        "more_smooth": more_smooth,
        "num_tokens": tokens,
        "order": order,
        "head_steps": first,
        "head_steps_last": last,
        "solver": solver,
    }
    sampler = next(iter(with_draft([sampler] if sampler else [], draft)), None)
    if draws_clips:
        video.sample_clips(pipeline, name, {**context.params, "sampler": sampler}, asked, as_json)
        return
    how_edited = {"box": box, "keep": keep, "extend": extend, "strength": strength, "threshold": threshold, "fit": fit}
    edit = editing.EditCommand(pipeline, image, mask, {**how_edited, "paste_back": paste_back, "feather": feather})
    sized = editing.size_of(size)
    pipeline.at_size(**sized)  # refused before anything is announced
    steer = steering.ControlCommand(pipeline, name, control, control_strength, extract, sized, edit.on)
    ids, draw = wanted(pipeline, name, classes, prompt, negative_prompt, features, edit.on)
    num = num or len(ids)
    extra: dict[str, Any] = {"negative_prompt": negative_prompt} if negative_prompt else {}
    extra |= sized
    chosen, took = pipeline.choose_sampler(sampler, min(batch_size, num)), list[dict[str, Any]]()
    settings = chosen.settings(**pipeline.check_settings({**asked, "num_steps": steps}, chosen))
    judged = Judged(pipeline, edit.instead_of(draw), ids, best_of, classifier, accept)
    say(
        f"{name}: {num} images, seed {seed}, guidance {settings['guidance_scale']:g} "
        f"({settings['guidance_schedule']}){judged.text}, {dtype} on {pipeline.device}"
    )
    began, maps = time.perf_counter(), steer.save(out)
    asked |= {"sampler": chosen, "num_inference_steps": steps, **steer.given}
    made = generate(judged, ids, num, seed, min(batch_size, num), took, **asked, **extra)
    how = {"sampler": sampler} if sampler else {}
    record = {"model": name, "seed": seed, "dtype": dtype, **how, **settings, **extra, **judged.record, **edit.record}
    record |= {**steer.record, "version": __version__}
    kind = ("prompt", "prompts") if prompt else ("features", "features") if features else ("class", "classes")
    files, labels = write(made, out, judged, record, kind, ids, num, zoom)
    seconds, drafts = time.perf_counter() - began, speculation(took)
    if as_json:
        result = {"files": [str(f) for f in files], kind[1]: labels, "seconds": seconds, "settings": record}
        if notes := [stats["note"] for stats in took if "note" in stats]:
            result["note"] = notes[0]
        if maps:
            result["controls"] = [str(path) for path in maps]
        typer.echo(json.dumps({**result, **drafts, **judged.found()}))
    else:
        what = out if out.suffix else f"{len(files)} images in {out}/"
        if drafts:
            say(told(drafts))
        for path in maps:
            say(f"the control map that was extracted: {path}")
        typer.echo(f"wrote {what} in {seconds:.1f} s ({seconds / num:.2f} s an image){judged.told()}")


def wanted(
    pipeline: Any,
    name: str,
    classes: str | None,
    prompt: Sequence[str] | None,
    negative_prompt: str | None,
    features: Sequence[Path] | None,
    editing: bool = False,
) -> tuple[list[Any], Callable[..., Any]]:
    """What is to be drawn, classes or texts in turn, and who draws it. Raises ValueError where the model cannot.

    Args: editing: an image is edited; without a class it is the null class, which leaves it to the surroundings.
    """
    from varkit.conditioning.label import LabelCondition

    of_text = pipeline.transformer.condition == "text"
    if of_text and (not (prompt or features) or classes):
        raise ValueError(f"{name} draws from texts: give --prompt or --features, and no --class")
    if not of_text and (prompt or negative_prompt or features):
        raise ValueError(f"{name} draws from classes: give --class, and no --prompt, --negative-prompt or --features")
    if features and editing:
        raise ValueError("--image goes with --prompt; features are of whole images")
    if features:
        rows = features_of(features, list(prompt or ()))
        ids = list(prompt or rows)
        return ids, lambda asked, **more: pipeline(features=[rows[one] for one in asked], **more)
    if of_text:
        return list(prompt or ()), pipeline
    count = pipeline.transformer.num_classes
    names = pipeline.split_labels(classes) if classes else [str(i) for i in ([count] if editing else range(count))]
    labels = pipeline.label_ids(names)
    LabelCondition(pipeline.transformer.num_classes).encode(class_labels=labels)
    return labels, pipeline


def head_steps_of(text: str | None, last: int | None) -> tuple[int | None, int | None]:
    """Steps of the first and the last group. Raises ValueError when they are said twice, or not numbers."""
    given = numbers(text, "--head-steps", int)
    if len(given) > 2:
        raise ValueError(f"--head-steps {text} must be one number, or those of the first and the last group")
    if len(given) == 2 and last is not None:
        raise ValueError(f"--head-steps {text} has the last group's steps; leave --head-steps-last {last} out")
    return (given[0] if given else None), (given[1] if len(given) == 2 else last)


class Judged:
    """Who draws, with what chooses among candidates, if anything does; it notes how they scored.

    Raises: ValueError on a classifier that does not fit, or a model of texts; FileNotFoundError when there is none.
    """

    def __init__(
        self,
        pipeline: Any,
        draw: Callable[..., Any],
        labels: Sequence[Any],
        best_of: int,
        classifier: str | None,
        accept: float | None,
    ) -> None:
        self.draw, self.more, self.record, self.text = draw, dict[str, Any](), dict[str, Any](), ""
        self.scores, self.chosen = list[list[float]](), list[int]()
        if best_of == 1 and classifier is None and accept is None:
            return
        if classifier is None:
            raise ValueError("--best-of and --accept need --classifier, who chooses: such as fashion-var")
        if pipeline.transformer.condition == "text":
            raise ValueError("--best-of compares images with their class; this model draws from texts: leave it out")
        from varkit.pipelines.best_of import BestOf

        chooser = BestOf(pipeline, best_of, classifier, accept)
        chooser.check_labels(labels)
        self.more = {"best_of": best_of, "classifier": chooser.judge, "accept": accept}
        self.record = {"best_of": best_of, "classifier": classifier, "accept": accept}
        self.text = f", best of {best_of} by {classifier}"

    def __call__(self, asked: Sequence[Any], **more: Any) -> Any:
        out = self.draw(asked, **more, **self.more)
        self.scores += out.scores or []
        self.chosen += out.chosen or []
        return out

    def found(self, index: int | None = None) -> dict[str, Any]:
        """Of one image or of all: the probability of the class for each candidate, and which is kept."""
        if not self.record:
            return {}
        if index is None:
            return {"scores": self.scores, "chosen": self.chosen}
        return {"scores": self.scores[index], "chosen": self.chosen[index]}

    def told(self) -> str:
        if not self.record:
            return ""
        kept = [scores[i] for scores, i in zip(self.scores, self.chosen, strict=True)]
        first = [scores[0] for scores in self.scores]
        drawn = sum(len(scores) for scores in self.scores)
        return (
            f"; {drawn} candidates, mean probability of the class {sum(kept) / len(kept):.3f}, of the first ones alone "
            f"{sum(first) / len(first):.3f}"
        )


def write(
    made: Iterable[tuple[int, Any, Any]],
    out: Path,
    judged: Judged,
    record: dict[str, Any],
    kind: tuple[str, str],
    ids: Sequence[Any],
    num: int,
    zoom: int,
) -> tuple[list[Path], list[Any]]:
    """The images as files: which, and the class or text of each image. Args: kind: what these are called."""
    from tqdm import tqdm

    from varkit import pictures

    images, labels, files = [], [], []
    for index, label, image in tqdm(made, total=num, unit="image", disable=not sys.stderr.isatty()):
        if out.suffix == "":  # a folder: written as they come, so a long run loses nothing
            files.append(out / f"{index:06d}.png")
            pictures.save_png(image, files[-1], {**record, "index": index, kind[0]: label, **judged.found(index)})
        else:
            images.append(image)
        labels.append(label)
    if out.suffix:
        files = [out]
    if out.suffix == ".npz":
        pictures.save_npz(images, labels if kind[0] == "class" else [i % len(ids) for i in range(num)], out)
    elif out.suffix == ".png":
        sheet = pictures.grid(images, pictures.columns_for(num, len(ids)), zoom)
        pictures.save_png(sheet, out, {**record, "num": num, kind[1]: ids, **judged.found()})
    return files, labels
