"""`varkit train` and `varkit sweep`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from varkit.commands.common import Json, refusing, say


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
