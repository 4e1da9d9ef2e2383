"""`varkit trajectories`: noise and the tokens that a teacher makes of it, for distilling the teacher."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands.common import Device, Json, refusing, say


@refusing
def trajectories(
    name: Annotated[str, typer.Argument(help="The teacher: a shipped model, a folder, a checkpoint, a repository.")],
    out: Annotated[Path, typer.Option(help="Folder for the trajectories; an unfinished one is gone on with.")],
    num: Annotated[int, typer.Option(min=1, help="Trajectories in all, classes in turn.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; another one for a validation set.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Of the teacher; the student has it built in.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Guidance over steps: constant, linear, ...")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the teacher.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the teacher.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the teacher.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Of the teacher.")] = None,
    map_steps: Annotated[int, typer.Option(min=1, help="Steps of the map from noise to a token.")] = 50,
    solver: Annotated[str, typer.Option(help="Of the map: heun or euler.")] = "heun",
    batch_size: Annotated[int, typer.Option(min=1, help="Drawn at once.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Written, or lost at a stop, together.")] = 1024,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw from a teacher by a map from noise to tokens, for `objective: distilled`. Run it again to go on."""
    from varkit.pipelines.auto import AutoPipeline
    from varkit.pipelines.sample_set import launched
    from varkit.pipelines.trajectories import make_trajectories
    from varkit.samplers.flow_map import FlowMap

    flow_map = FlowMap(map_steps, solver)
    state = launched(device)
    began = time.perf_counter()
    teacher = AutoPipeline.from_pretrained(name).to(state.device)
    result = make_trajectories(
        teacher,
        out,
        num=num,
        name=name,
        seed=seed,
        flow_map=flow_map,
        batch_size=batch_size,
        shard_size=shard_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        announce=say,
        progress=state.is_main_process and not as_json and sys.stderr.isatty(),
        guidance_scale=guidance,
        guidance_schedule=schedule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    state.wait_for_everyone()
    seconds = time.perf_counter() - began
    if state.is_main_process:
        if as_json:
            typer.echo(json.dumps({**result._asdict(), "folder": str(out), "seconds": seconds}))
        else:
            whose = "" if state.num_processes == 1 else " by this process"
            typer.echo(
                f"wrote {out}: {result.made} trajectories{whose} in {seconds:.1f} s, {result.there} were there; "
                f"train on them with objective.name=distilled and data.train={out}"
            )
    state.destroy_process_group()
