"""The command line. Heavy imports sit inside each command, so `varkit --help` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import varkit
from varkit.commands import bench as of_bench
from varkit.commands import clips as of_clips
from varkit.commands import control as of_control
from varkit.commands import features as of_features
from varkit.commands import latents as of_latents
from varkit.commands import retrieval as of_retrieval
from varkit.commands import sample as of_sample
from varkit.commands import trajectories as of_trajectories
from varkit.commands.common import Device, Dtype, Json, numbers, refusing, say

app = typer.Typer(
    help="varkit: images by next-scale, next-token and next-block prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at a data folder; prepare a named data set.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def version(value: bool) -> None:
    if value:
        typer.echo(f"varkit {varkit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """varkit: images by next-scale, next-token and next-block prediction."""


app.command()(of_sample.sample)


@app.command()
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


@app.command("eval")
@refusing
def eval_(
    context: typer.Context,
    generated: Annotated[
        str,
        typer.Argument(help="A folder, .npz, tars, data set, videos; or a model, which is sampled; or a tokenizer."),
    ],
    reference: Annotated[str, typer.Argument(help="Real images or videos in the same forms, or a statistics .npz.")],
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="A name (`varkit list`) or a .yaml file.")],
    metrics: Annotated[
        str | None, typer.Option(help="Instead of the protocol's, separated by commas: fid,is,...")
    ] = None,
    num: Annotated[int | None, typer.Option(min=2, help="Images to score, if not the protocol's number.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the protocol: key=value. Repeatable.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the reference: train, val or test.")] = None,
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The network's file, or a folder that holds it.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing weights whose checksum is known.")] = False,
    classifier: Annotated[Path | None, typer.Option(help="Folder of the classifier that `accuracy` asks.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Of a model: guidance scales, separated by commas.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Of a model whose steps can be chosen: numbers of them, separated by commas.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Of a model: constant, linear, cosine or late.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of a model.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of a model.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of a model.")] = None,
    bounds: Annotated[
        str | None, typer.Option(help="Held-out real images (fashion-mnist:test), scored too, and reconstructed.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", "--lengths", help="Of a model that can stop early, or a flexible tokenizer: 1,2,4,8."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report that opens in a browser (extra `eval`).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON, for `varkit compare`.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at once.")] = 32,
    cache: Annotated[bool, typer.Option(help="Keep the reference's statistics for the next time.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score images, reconstructions or videos by a named protocol, with intervals."""
    from varkit.metrics.collect import process
    from varkit.metrics.evaluate import evaluate

    sampling = {"guidance_schedule": schedule, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    report = evaluate(
        generated,
        reference,
        protocol=protocol,
        metrics=metrics.split(",") if metrics else (),
        num=num,
        overrides=change or (),
        split=split,
        root=root,
        classifier=classifier,
        guidance=numbers(guidance, "--guidance", float),
        sampling=sampling,
        bounds=bounds,
        lengths=numbers(tokens, "--tokens", int),
        steps=numbers(steps, "--steps", int),
        weights=weights,
        download=download,
        device=device,
        batch_size=batch_size,
        cache=cache,
        progress=sys.stderr.isatty(),
    )
    report.environment["command"] = typed(context)
    if process()[0] == 0:
        give(report, out, html, as_json)


@app.command()
@refusing
def compare(
    reports: Annotated[list[Path], typer.Argument(help="JSON files that `varkit eval --out` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write all of them as one page (extra `eval`).")] = None,
    as_json: Json = False,
) -> None:
    """Put reports beside each other; those of different protocols or references are refused."""
    from varkit.metrics.report import Report, join

    give(join([Report.read(path) for path in reports]), None, html, as_json)


def typed(context: typer.Context) -> str:
    """The command as it was typed, whatever launched it: for the report, and through it for the model's card."""
    words = ["varkit", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [next(o for o in parameter.opts if o.startswith("--")), str(one)]
    return shlex.join(words)


def give(report: Any, out: Path | None, html: Path | None, as_json: bool) -> None:
    """Print a report, and write it where it was asked for."""
    if out is not None:
        report.write(out)
    if html is not None:
        from varkit.metrics.html import write_html

        write_html(report, html)
    typer.echo(json.dumps(report.to_dict()) if as_json else "\n".join(report.lines()))
    if not as_json:
        for path in (out, html):
            if path is not None:
                typer.echo(f"wrote {path}")


@data_app.command("check")
@refusing
def data_check(
    source: Annotated[
        str, typer.Argument(help="A folder, .npz, .npy or IDX file, tars, hf:NAME, videos, or a named data set.")
    ],
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode images or videos.")] = 0,
    split: Annotated[str, typer.Option(help="train, val or test, where the source has splits.")] = "train",
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    videos: Annotated[
        bool,
        typer.Option("--videos", help="Also where there are images: their folders are videos, one frame each."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every image or video; report classes, counts, sizes and broken files. Exit code 1 if any is broken."""
    from varkit.data.check import DataReport, check_images
    from varkit.data.check_clips import ClipReport, is_video_source

    report: DataReport | ClipReport
    if videos or is_video_source(source):
        report = of_clips.check(source, workers, split, root, as_json)
    else:
        bar = sys.stderr.isatty() and not as_json
        report = check_images(source, workers=workers, split=split, root=root, progress=bar)
    typer.echo(json.dumps(report.to_dict()) if as_json else "\n".join(report.lines()))
    if report.broken:
        raise typer.Exit(1)


@data_app.command("fashion-mnist")
@refusing
def data_fashion(
    out: Annotated[Path, typer.Option(help="Folder for train.npz and test.npz.")] = Path("data/fashion-mnist"),
    root: Annotated[Path | None, typer.Option(help="Folder with the IDX files, if not in its usual place.")] = None,
) -> None:
    """Write Fashion-MNIST as train.npz and test.npz (ADM layout)."""
    from varkit.data.fashion import prepare_fashion_mnist

    counts = prepare_fashion_mnist(out, root)
    typer.echo(f"wrote {', '.join(f'{split}.npz ({n} images)' for split, n in counts.items())} into {out}")


data_app.command("moving-fashion")(of_clips.moving_fashion)


@data_app.command("emoji")
@refusing
def data_emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make, with train/ and test/ in it.")] = Path("data/emoji"),
    sources: Annotated[
        list[str] | None,
        typer.Option("--from", help="Each package as a .tgz file or an unpacked folder, instead of a download."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write emoji of Google and Twitter, 64x64, with captions; fetched from the npm registry (136 MB)."""
    from varkit.data.emoji import prepare_emoji

    counts = prepare_emoji(out, sources or (), announce=say, progress=sys.stderr.isatty() and not as_json)
    told = ", ".join(f"{split} ({n} images)" for split, n in counts.items())
    typer.echo(json.dumps({"folder": str(out), "images": counts}) if as_json else f"{out} holds {told} and CREDITS.txt")


@app.command()
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


app.command()(of_bench.bench)
app.command()(of_control.control)
app.command("control-score")(of_control.control_score)
app.command()(of_features.features)
app.command()(of_latents.latents)
app.command()(of_trajectories.trajectories)
app.command()(of_retrieval.retrieval)


@app.command()
@refusing
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (`varkit list`) or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=2e-4 out=runs/a")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps, say what the run would take and write, write nothing.")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole recipe and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train a tokenizer, a generator or a classifier by a recipe."""
    from varkit.training.recipe import load_recipe, recipe_values

    if as_json and not dry_run:
        raise ValueError("--json goes with --dry-run; a run writes its numbers as JSON into metrics.jsonl")
    loaded = load_recipe(recipe, overrides or [])
    if print_config:
        import yaml

        typer.echo(yaml.safe_dump(recipe_values(loaded), sort_keys=False), nl=False)
        return
    try:
        if dry_run:
            tell_dry_run(loaded, resume, as_json)
            return
        from varkit.training.loop import train as run

        result = run(loaded, resume=resume)
    except FloatingPointError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    from accelerate import PartialState

    if result.model is not None and PartialState().is_main_process:
        typer.echo(f"wrote {result.model}")


def tell_dry_run(recipe: Any, resume: bool, as_json: bool) -> None:
    """What a run would take and write."""
    from accelerate import PartialState

    from varkit.training.dry_run import dry_run
    from varkit.training.dry_run_text import lines

    facts = dry_run(recipe, resume=resume)
    if PartialState().is_main_process:
        typer.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


@app.command()
@refusing
def sweep(
    name: Annotated[str, typer.Argument(help="A shipped sweep (`varkit list`) or the path of a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for every member; out=FOLDER for all runs.")
    ] = None,
    members: Annotated[
        str | None, typer.Option(help="Train these alone, in this order: d4,d2. Default: all that are not finished.")
    ] = None,
    train_: Annotated[bool, typer.Option("--train/--no-train", help="Or only fit what is finished.")] = True,
    as_json: Json = False,
) -> None:
    """Train a ladder of sizes and fit the power law of VAR's paper. Run it again to go on after a stop."""
    from varkit.training.sweep import load_sweep, run_sweep

    loaded = load_sweep(name, overrides or [])
    result = run_sweep(loaded, [] if not train_ else members.split(",") if members else None)
    from accelerate import PartialState

    if PartialState().is_main_process:
        tell_sweep(result, as_json)


def tell_sweep(result: Any, as_json: bool) -> None:
    """The laws, what was written, and what is still to be trained."""
    from dataclasses import asdict

    from varkit.training.scaling import fit_lines

    if as_json:
        found = {"fits": [asdict(f) for f in result.fits], "finished": result.finished, "waiting": result.waiting}
        typer.echo(json.dumps({**found, "files": [str(f) for f in result.files]}))
        return
    for line in fit_lines(result.fits):
        typer.echo(line)
    if not result.fits:
        typer.echo(f"{len(result.finished)} members finished; the fit needs 3")
    if result.waiting:
        typer.echo(f"not finished: {', '.join(result.waiting)}; the same command goes on with them")
    typer.echo("wrote " + ", ".join(str(f) for f in result.files) if result.files else "wrote nothing")


@app.command()
@refusing
def convert(
    source: Annotated[Path, typer.Argument(help="A released file (.pth, .pt), or a folder to convert back.")],
    to: Annotated[Path, typer.Option(help="The folder to write; or, back, a .pth or .safetensors file.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="With a generator's file: its tokenizer's, for a whole pipeline.")
    ] = None,
    part: Annotated[str, typer.Option(help="Back, from a pipeline: transformer or image_tokenizer.")] = "transformer",
    dtype: Dtype = "float32",
    grid: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a side, where neither keys nor the file's name tell: 24 for 384 px."),
    ] = None,
    class_texts: Annotated[
        Path | None, typer.Option(help="Of NBP's files of UCF-101: JSON with the ids of each class's text.")
    ] = None,
) -> None:
    """Released files <-> the diffusers folder format."""
    from varkit.checkpoints.convert import convert as run

    options: dict[str, Any] = {"part": part, "dtype": dtype, "grid": grid, "class_texts": class_texts}
    for line in run(source, to, tokenizer=tokenizer, **options):
        typer.echo(line)


@app.command()
@refusing
def push(
    folder: Annotated[Path, typer.Argument(help="A saved pipeline or model, such as the model/ folder of a run.")],
    repo: Annotated[str, typer.Argument(help="The hub repository, user/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    report: Annotated[Path | None, typer.Option(help="JSON of `varkit eval --out`: the card's scores.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run, for the card. Default: the one that holds FOLDER.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="As the hub spells it: apache-2.0, mit, ...")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Trained on, by its name on the hub. Repeatable.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Send this file of FOLDER too, whatever it is. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files; send nothing.")] = False,
) -> None:
    """Upload a model with its card to the Hugging Face Hub: safetensors, JSON, Markdown and PNG files alone."""
    from varkit.hub import plan_upload
    from varkit.hub import push as send

    plan = plan_upload(
        folder, repo, report=report, run=run, licence=licence, datasets=dataset or (), include=include or ()
    )
    if dry_run:
        typer.echo(plan.files["README.md"])
    for name in plan.files:
        say(f"{'would send' if dry_run else 'sending'} {name}")
    for name in plan.left_out:
        say(f"stays here: {name} (--include sends it)")
    if not dry_run:
        address = send(plan, repo, private=private or None)
        typer.echo(f"pushed {len(plan.files)} files to {address}")


@app.command("list")
@refusing
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, such as 'var*'.")] = "*",
    as_json: Json = False,
) -> None:
    """Shipped models, released checkpoints, architectures, data sets and recipes."""
    from varkit.catalog import catalog

    found = catalog(pattern)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for section, entries in found.items():
        typer.echo(f"{section}:")
        width = max((len(n) for n in entries), default=0)
        for key, text in entries.items():
            typer.echo(f"  {key:<{width}}  {text}")
        if not entries:
            typer.echo(f"  none matches {pattern!r}")


@app.command()
@refusing
def info(
    name: Annotated[str, typer.Argument(help="A name that `varkit list` shows, or a saved folder.")],
    as_json: Json = False,
) -> None:
    """Parameters, token layout, licence, card."""
    from varkit.catalog import describe

    found = describe(name)
    if as_json:
        typer.echo(json.dumps(found))
        return
    card = found.pop("card", None)
    width = max(len(k) for k in found)
    for key, value in found.items():
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")
    if card:
        typer.echo(f"\n{card}")


@app.command()
@refusing
def demo(
    model: Annotated[
        list[str] | None, typer.Option(help="A shipped model or a saved folder. Repeatable. Default: fashion-var.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    reference: Annotated[str, typer.Option(help="Real images that Evaluate scores against.")] = "fashion-mnist",
    max_images: Annotated[int, typer.Option(min=1, help="Images of one request.")] = 16,
    max_evaluated: Annotated[int, typer.Option(min=16, help="Images of one evaluation.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue, of all visitors.")] = 200,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Megabytes of an uploaded file.")] = 10,
    max_side: Annotated[int, typer.Option(min=1, help="Pixels of an uploaded image's longer side.")] = 4096,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, drawn or sent to be continued.")] = 128,
    max_seconds: Annotated[int, typer.Option(min=1, help="Seconds of an uploaded clip.")] = 60,
) -> None:
    """Open the web demo (needs the extra `app`)."""
    from varkit.demo.app import launch
    from varkit.demo.limits import Limits

    limits = Limits(max_images, max_evaluated, max_waiting, max_upload_mb, max_side, max_frames, max_seconds)
    launch(host=host, port=port, model=model or ["fashion-var"], limits=limits, reference=reference)


def main() -> None:
    """Entry point of the `varkit` command."""
    app()
