"""`varkit reconstruct` and `varkit tokenize`: what a tokenizer makes of images and videos."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands import clips as of_clips
from varkit.commands.common import Device, Dtype, Json, refusing, say


@refusing
def reconstruct(
    name: Annotated[str, typer.Argument(help="A shipped model, a pipeline or tokenizer folder, or a released file.")],
    images: Annotated[
        str,
        typer.Argument(
            help="Images: a folder, .npz, tars, hf:NAME or a named data set; videos for a tokenizer of clips."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for originals.png, reconstructions.png (of videos NAME.mp4) and metrics.json.")
    ],
    num: Annotated[
        int | None, typer.Option(min=1, help="How many, from the first. Default: 64 images, 8 videos.")
    ] = None,
    mode: Annotated[str, typer.Option(help="How images get the model's size: center, squash or pad.")] = "center",
    split: Annotated[
        str | None, typer.Option(help="train, val or test. Default: test of a named data set, else the source itself.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a flexible tokenizer: decode the first so many tokens.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="... or the fewest of 1, 2, 4, ... that reach so many dB, image by image.")
    ] = None,
    lpips: Annotated[float | None, typer.Option(help="... or that come within this LPIPS (alex).")] = None,
    by_frame: Annotated[
        bool, typer.Option("--by-frame", help="With a tokenizer of images: videos, each frame by itself.")
    ] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Of each video: its first so many. Default: all.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="... every which frame. Default: 1.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="... of the files written: mp4, gif, webp, webm, ... Default: mp4.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Send images through a tokenizer and back; report PSNR, SSIM and the use of the codebook, scale by scale.

    With a tokenizer of clips, or --by-frame: videos, window by window, with PSNR and SSIM of each frame.
    """
    from varkit.metrics.reconstruction import reconstruct_folder
    from varkit.pipelines.auto import open_tokenizer
    from varkit.tokenizers.frames import FrameTokenizer

    tokenizer = open_tokenizer(name)
    if by_frame:
        if tokenizer.num_frames is not None:
            raise ValueError(f"--by-frame is for tokenizers of images; {name} codes clips")
        tokenizer = FrameTokenizer.around(tokenizer, of_clips.FRAMES_AT_ONCE)
    if tokenizer.num_frames is not None:
        if any(given is not None for given in (tokens, psnr, lpips)):
            raise ValueError(f"--tokens, --psnr and --lpips are of images; {name} codes clips")
        of_clips.reconstruct(
            name, tokenizer, images, out, as_json, num=num or 8, mode=mode, split=split, root=root,
            device=device, frames=frames, stride=stride or 1, file_format=file_format or "mp4"
        )  # fmt: skip
        return
    if any(given is not None for given in (frames, stride, file_format)):
        raise ValueError(f"--frames, --stride and --format are of videos; {name} codes images (see --by-frame)")
    result = reconstruct_folder(
        tokenizer, images, out, num=num or 64, mode=mode, split=split, root=root, device=device, tokens=tokens,
        target_psnr=psnr, target_lpips=lpips
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    further = {"ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips_alex": "LPIPS (alex)"}
    measured = [f"{title} {result[key]:.4f}" for key, title in further.items() if key in result]
    typer.echo(", ".join([f"{result['images']} images: PSNR {result['psnr']:.2f} dB", *measured]))
    if each := result.get("lengths"):
        counts = ", ".join(f"{n} for {each.count(n)}" for n in sorted(set(each)))
        typer.echo(f"  tokens      : {sum(each) / len(each):.1f} an image; {counts}")
    for row in result.get("scales", []):
        typer.echo(f"  scale {row['grid']:>6}: {row['used']} codes used, perplexity {row['perplexity']:.1f}")
    if "used" in result:
        typer.echo(f"  all scales  : {result['used']} of {result['codebook']} codes used ({result['used_share']:.1%})")
    typer.echo(f"wrote {out}/originals.png, reconstructions.png, metrics.json")


@refusing
def tokenize(
    name: Annotated[str, typer.Argument(help="A tokenizer: a shipped model, a folder, a released checkpoint or file.")],
    data: Annotated[str, typer.Argument(help="Images, or videos: whatever `varkit data check` reads.")],
    out: Annotated[Path, typer.Option(help="Folder for the token files; an unfinished one is gone on with.")],
    split: Annotated[str, typer.Option(help="train, val, validation or test.")] = "train",
    mode: Annotated[
        str, typer.Option(help="center, pad or squash: how images come to the tokenizer's size.")
    ] = "center",
    enlarge: Annotated[
        list[float] | None,
        typer.Option(help="Size of what is cut from, in image sizes: 1; of ten crops 1.1, or several by repeating it."),
    ] = None,
    crops: Annotated[int, typer.Option(help="1, or 10: corners, middle and their mirror images.")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Also code each mirror image.")] = False,
    frames: Annotated[
        int | None, typer.Option(min=1, help="With a tokenizer of images: clips of so many, each frame by itself.")
    ] = None,
    clips: Annotated[
        int, typer.Option(min=1, help="Of each video: clips, evenly over it; 1 is that in the middle.")
    ] = 1,
    stride: Annotated[int, typer.Option(min=1, help="... every which frame.")] = 1,
    fps: Annotated[float | None, typer.Option(help="... instead: about so many frames a second.")] = None,
    moments: Annotated[
        bool, typer.Option("--moments", help="Of latents: store mean and spread, so that training draws anew.")
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, where the tokenizer can code several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images that are written, or lost at a stop, together.")
    ] = 2048,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of tokenizers that draw.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Code a set of images or videos once, for training from token files. Run it again to go on after a stop."""
    from dataclasses import asdict

    import torch

    from varkit.data.codes import CodeSet
    from varkit.pipelines.auto import open_tokenizer
    from varkit.pipelines.extract_codes import Views, extract_codes
    from varkit.pipelines.sample_set import launched

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16; got {dtype!r}")
    views = Views(
        mode=mode,  # type: ignore[arg-type]
        enlarge=tuple(enlarge or [1.1 if crops == 10 else 1.0]),
        crops=crops,
        flip=flip,
        clips=clips,
        stride=stride,
        fps=fps,
    )
    state = launched(device)
    began = time.perf_counter()
    tokenizer = open_tokenizer(name, image_size=image_size, num_frames=frames).eval().to(state.device)
    result = extract_codes(
        tokenizer if dtype == "float32" else tokenizer.to(getattr(torch, dtype)),
        data,
        out,
        name=name,
        split=split,
        views=views,
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        seed=seed,
        moments=moments,
        process_index=state.process_index,
        num_processes=state.num_processes,
        announce=say,
        progress=state.is_main_process and not as_json,
    )
    state.wait_for_everyone()
    seconds = time.perf_counter() - began
    if state.is_main_process:
        found = None if tokenizer.layout.codebook_size is not None else CodeSet(out).statistics
        names = views.names if tokenizer.num_frames is None else views.clip_names(tokenizer.num_frames)
        what = "images" if tokenizer.num_frames is None else "videos"
        if as_json:
            told = {**result._asdict(), "folder": str(out), "views": names, "seconds": seconds}
            typer.echo(json.dumps(told if found is None else {**told, "latents": asdict(found)}))
        else:
            lost = f", {result.skipped} unreadable and left out" if result.skipped else ""
            whose = "" if state.num_processes == 1 else " by this process"
            typer.echo(
                f"wrote {out}: {result.made} {what}{whose} in {seconds:.1f} s, {result.there} were there{lost}; "
                f"{len(names)} view{'s' if len(names) > 1 else ''} each"
            )
            if found is not None:
                typer.echo(f"latents: {found}")
    state.destroy_process_group()
