"""The facts of a dry run in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PARTS = 6
"""Parts of a network that are listed; the smaller ones are one line."""


def lines(facts: dict[str, Any]) -> list[str]:
    """What `varkit.training.dry_run.dry_run` found, as text for a terminal."""
    sections = {
        "run": run_lines(facts["run"]),
        "data": data_lines(facts["run"]),
        "networks": network_lines(facts["networks"]),
        "tokens": token_lines(facts["tokens"]),
        "steps": step_lines(facts["run"], facts["step_kinds"]),
        "memory": memory_lines(facts["memory"]),
        "time": time_lines(facts["time"], facts["run"]),
        "writes": write_lines(facts["writes"], facts["disk"]),
        "warning": iter(facts["warnings"]),
    }
    found = []
    for title, rows in sections.items():
        for i, row in enumerate(rows):
            found.append(f"{title if i == 0 or title == 'warning' else '':<10}{row}")
    return [*found, "A dry run: nothing was written, and the steps are forgotten."]


def run_lines(run: dict[str, Any]) -> Iterator[str]:
    compiled = ", compiled" if run["compile"] else ""
    yield (
        f"{run['recipe']} ({run['objective']}), precision {run['precision']}{compiled}, on {run['device']} "
        f"x {run['processes']}"
    )
    if run["from_step"]:
        yield f"resumed at step {run['from_step']:,} after {duration(run['seconds_so_far'])}"


def data_lines(run: dict[str, Any]) -> Iterator[str]:
    height, width = run["image_size"]
    yield f"{run['data']}: {run['images']:,} images of {run['classes']} classes, as {height}x{width}"
    if run["validation"]:
        yield f"validation: {run['validation']}, {run['validation_images']:,} images"


def network_lines(networks: list[dict[str, Any]]) -> Iterator[str]:
    for network in networks:
        yield f"{network['name']} ({network['class']}): {learning(network).strip()}"
        parts = sorted(network["parts"].items(), key=lambda item: -sum(item[1].values()))
        parts = [(name, counts) for name, counts in parts if sum(counts.values())]
        shown, rest = (parts, []) if len(parts) <= PARTS else (parts[: PARTS - 1], parts[PARTS - 1 :])
        if rest:
            sums = {key: sum(counts[key] for _, counts in rest) for key in ("trained", "frozen")}
            shown = [*shown, (f"{len(rest)} more", sums)]
        for name, counts in shown if len(parts) > 1 else []:
            yield f"  {name:<18} {learning(counts)}"


def learning(counts: dict[str, int]) -> str:
    kinds = [f"{counts[kind]:>12,} {kind}" for kind in ("trained", "frozen") if counts[kind]]
    return ", ".join(kinds) or "no parameters"


def token_lines(tokens: dict[str, Any] | None) -> Iterator[str]:
    if tokens is None:
        yield "none"
        return
    grids = " ".join("x".join(map(str, sides)) for sides in tokens["grids"])
    groups = f", predicted in {tokens['groups']} groups" if tokens["groups"] else ""
    codes = f"codebook {tokens['codebook_size']}" if tokens["codebook_size"] else f"latents of {tokens['dim']} numbers"
    yield f"{tokens['length']:,} an image{groups}: grids {grids}, {codes}"


def step_lines(run: dict[str, Any], kinds: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{run['steps']:,} of {run['batch_size']} images: {run['micro_batch']} at once x accumulation "
        f"{run['accumulation']} x processes {run['processes']}; {run['epochs']:.2f} epochs"
    )
    if not kinds:
        yield "none is left: the run is finished"
    for kind in kinds:
        speed = f"{run['batch_size'] / kind['seconds']:,.0f} images/s"
        used = f", {kind['mfu']:.1%} of the device's peak (MFU)" if "mfu" in kind else ""
        yield (
            f"{kind['steps']:,} that train {' and '.join(kind['phases'])}: {kind['seconds']:.3g} s each, {speed}, "
            f"{kind['data_wait']:.1%} of it waiting for images"
        )
        yield (f"  a process computes {kind['flops'] / 1e9:,.4g} GFLOP a step, {kind['tflops']:.3g} TFLOP/s{used}")


def memory_lines(memory: dict[str, int]) -> Iterator[str]:
    known = ("parameters", "gradients", "optimizer", "average")
    yield ", ".join(f"{name} {size(memory[name])}" for name in known) + " (by their sizes)"
    yield f"activations and work space {size(memory['activations'])} (measured), all else {size(memory['other'])}"
    of = f" of {size(memory['total'])}" if memory["total"] else ""
    yield (
        f"peak of a process {size(memory['peak'])}{of}: in steps {size(memory['peak_steps'])}, "
        f"in validation and sampling {size(memory['peak_pauses'])}"
    )


def time_lines(time: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    yield f"about {duration(time['total'])} for {run['steps_left']:,} steps: an estimate from 3 of each kind"
    yield (
        f"steps {duration(time['steps'])}, {time['validations']} validations {duration(time['validation'])}, "
        f"{time['sample_sheets']} sample sheets {duration(time['samples'])}, "
        f"{time['save_count']} checkpoints {duration(time['saves'])}"
    )


def write_lines(writes: list[dict[str, Any]], disk: dict[str, int]) -> Iterator[str]:
    width = max((len(row["path"]) for row in writes), default=0)
    names = {"checkpoints": "kept", "samples": "sheets", "metrics.jsonl": "lines and those of validation"}
    for row in writes:
        what = next((f", {row['count']:,} {word}" for end, word in names.items() if row["path"].endswith(end)), "")
        yield f"{row['path']:<{width}}  {size(row['bytes']) if row['bytes'] else 'the same numbers'}{what}"
    yield f"at most {size(disk['need'])} more, while a checkpoint is saved; {size(disk['free'])} are free"


def size(count: float) -> str:
    """Bytes in words: 1.5 GB is 1.5e9."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
