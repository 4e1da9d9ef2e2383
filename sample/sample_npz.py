"""Sample the set that a model is judged by, on any number of devices.

    accelerate launch sample/sample_npz.py NAME --num 50000 --guidance 2 --out samples.npz

Also runs plainly, by `python`, and by `torchrun --nproc_per_node 2 -- sample/sample_npz.py NAME ...` (without that `--`
torchrun takes `--num` for its own). After a stop, the same command makes what is missing.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import open_pipeline, refusing, say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@refusing
def sample_npz(
    name: Annotated[str, typer.Argument(help="A shipped model, a saved folder, a checkpoint or a hub repository.")],
    num: Annotated[int, typer.Option(min=1, help="Images in the set.")] = 50_000,
    out: Annotated[Path, typer.Option(help="FILE.npz in ADM layout, or FOLDER/ of PNG files.")] = Path("samples.npz"),
    labels: Annotated[str, typer.Option(help="cycled (0, 1, 2, ...), balanced (equal shares) or random.")] = "cycled",
    seed: Annotated[int, typer.Option(min=0, help="Names the set; an image is the same at any batch size.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="uncond + w (cond - uncond); 1 is off.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Guidance over steps: constant, linear, cosine, late.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 sharper, above 1 flatter.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of mass p; 1 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than p times the best.")] = None,
    more_smooth: Annotated[bool | None, typer.Option(help="Blend codes: smoother pictures, worse statistics.")] = None,
    rule: Annotated[
        str, typer.Option(help="Floats to bytes: round, llamagen, mar, titok_sample, titok_eval, adm, var, save_image.")
    ] = "round",
    shuffle: Annotated[bool, typer.Option(help="Store in random order: some evaluators score parts in order.")] = True,
    shuffle_seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Names that order.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at once by a process; at most a block.")] = 64,
    block_size: Annotated[int, typer.Option(min=1, help="Images that are written, or lost at a stop, together.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps; processes get one each.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the set that is at --out.")] = False,
) -> None:
    """Sample many images for evaluation. Needs twice the room of the set while it is made."""
    from varkit.pipelines.sample_set import launched, sample_set

    began, state = time.perf_counter(), launched(device)
    pipeline = open_pipeline(name, str(state.device), dtype)
    settings: dict[str, Any] = {"guidance_scale": guidance, "guidance_schedule": schedule, "temperature": temperature}
    settings |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "more_smooth": more_smooth}
    result = sample_set(
        pipeline,
        out,
        num=num,
        labels=labels,
        seed=seed,
        rule=rule,
        shuffle_seed=shuffle_seed if shuffle else None,
        batch_size=batch_size,
        block_size=block_size,
        name=name,
        overwrite=overwrite,
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait=state.wait_for_everyone,
        announce=say,
        progress=state.is_main_process,
        **settings,
    )
    if state.is_main_process:
        made = f"{result.made} new, {time.perf_counter() - began:.1f} s"
        typer.echo(f"{out} is there already, as asked for" if result.there else f"wrote {out}: {num} images ({made})")
    state.destroy_process_group()


if __name__ == "__main__":
    app()
