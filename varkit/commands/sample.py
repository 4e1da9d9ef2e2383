"""`varkit sample`: images of classes or texts, as a grid, single files or an archive."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit import __version__
from varkit.commands.common import Device, Dtype, Json, numbers, open_pipeline, refusing, say
from varkit.commands.features import features_of


@refusing
def sample(
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
        str | None, typer.Option(help="Guidance over steps: constant, linear, cosine, late, ...")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="First and last guided step, from 0: 0,99. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps, where the model can take several.")] = None,
    head_steps: Annotated[
        str | None,
        typer.Option(
            help="Of a model of latents: steps of its flow or diffusion; 50,5: from the first group to the last."
        ),
    ] = None,
    order: Annotated[str | None, typer.Option(help="Of the tokens, where the model can take any: raster, ...")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 sharper, above 1 flatter.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of mass p; 1 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than p times the best.")] = None,
    more_smooth: Annotated[bool | None, typer.Option(help="Blend codes: smoother pictures, worse statistics.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop after the first so many tokens.")] = None,
    out: Annotated[Path, typer.Option(help="FILE.png: a grid; FOLDER/: single images; FILE.npz: ADM layout.")] = Path(
        "grid.png"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 16,
    zoom: Annotated[int, typer.Option(min=1, max=16, help="Draw each pixel this often in a grid.")] = 1,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Prepare decoding: weights repacked (CPU), CUDA graphs (GPU).")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Generate images. Each carries its settings as PNG metadata."""
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out {out} must end in .png (a grid), .npz, or be a folder")
    from tqdm import tqdm

    from varkit import pictures
    from varkit.conditioning.label import LabelCondition
    from varkit.pipelines.base import generate

    pipeline = open_pipeline(name, device, dtype)
    if optimize:
        pipeline.optimize_decoding()
    of_text = pipeline.transformer.condition == "text"
    if of_text and (not (prompt or features) or classes):
        raise ValueError(f"{name} draws from texts: give --prompt or --features, and no --class")
    if not of_text and (prompt or negative_prompt or features):
        raise ValueError(f"{name} draws from classes: give --class, and no --prompt, --negative-prompt or --features")
    ids: list[Any] = list(prompt or ())
    draw = pipeline
    if features:
        rows = features_of(features, ids)
        ids, draw = ids or list(rows), lambda wanted, **more: pipeline(features=[rows[name] for name in wanted], **more)
    if not of_text:
        names = classes.split(",") if classes else [str(i) for i in range(pipeline.transformer.num_classes)]
        ids = pipeline.label_ids(names)
        LabelCondition(pipeline.transformer.num_classes).encode(class_labels=ids)
    num = num or len(ids)
    extra = {"negative_prompt": negative_prompt} if negative_prompt else {}
    of_head: list[int | None] = numbers(head_steps, "--head-steps", int)
    if len(of_head) > 2:
        raise ValueError(f"--head-steps {head_steps} must be one number, or those of the first and the last group")
    first, last = (*of_head, None, None)[:2]
    given = {
        "guidance_scale": guidance,
        "guidance_schedule": schedule,
        "guidance_interval": numbers(guidance_interval, "--guidance-interval", int) or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "more_smooth": more_smooth,
        "num_tokens": tokens,
        "order": order,
        "head_steps": first,
        "head_steps_last": last,
    }
    settings = pipeline.sampler.settings(**given, num_steps=steps)
    say(
        f"{name}: {num} images, seed {seed}, guidance {settings['guidance_scale']:g} "
        f"({settings['guidance_schedule']}), {dtype} on {pipeline.device}"
    )
    began = time.perf_counter()
    made = generate(draw, ids, num, seed, min(batch_size, num), **given, num_inference_steps=steps, **extra)
    record = {"model": name, "seed": seed, "dtype": dtype, **settings, **extra, "version": __version__}
    kind, kinds = ("prompt", "prompts") if prompt else ("features", "features") if features else ("class", "classes")
    images, labels, files = [], [], []
    for index, label, image in tqdm(made, total=num, unit="image", disable=not sys.stderr.isatty()):
        if out.suffix == "":  # a folder: written as they come, so a long run loses nothing
            files.append(out / f"{index:06d}.png")
            pictures.save_png(image, files[-1], {**record, "index": index, kind: label})
        else:
            images.append(image)
        labels.append(label)
    if out.suffix:
        files = [out]
    if out.suffix == ".npz":
        pictures.save_npz(images, [i % len(ids) for i in range(num)] if of_text else labels, out)
    elif out.suffix == ".png":
        sheet = pictures.grid(images, pictures.columns_for(num, len(ids)), zoom)
        pictures.save_png(sheet, out, {**record, "num": num, kinds: ids})
    seconds = time.perf_counter() - began
    if as_json:
        result = {"files": [str(f) for f in files], kinds: labels, "seconds": seconds, "settings": record}
        typer.echo(json.dumps(result))
    else:
        what = out if out.suffix else f"{len(files)} images in {out}/"
        typer.echo(f"wrote {what} in {seconds:.1f} s ({seconds / num:.2f} s an image)")
