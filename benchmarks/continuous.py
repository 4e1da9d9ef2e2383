"""What the generators of latents cost at official size, random weights: MAR, xAR and FlowAR.

    python benchmarks/continuous.py                                        # MAR-B, xAR-B, FlowAR-S, batch 1 and 8
    python benchmarks/continuous.py mar_b --batches 1 --variants           # beside fewer steps and less guidance
    python benchmarks/continuous.py flowar_s --head-steps 24               # nothing left out

Settings are those of the released checkpoint. Timed is the sampler alone, without the tokenizer's decoder; all rows
run in one process, and the ratio of each is against the first of its model and batch. The sampler takes all steps of
all groups, but with `--head-steps` the network of a group is run in evenly spaced ones alone, and with `--groups` a
model without a cache is run in evenly spaced groups alone; on a CPU by default. What was not run counts as long as what
was run nearby: such times have a ~, and the last column says how much was run. Calls are counted, run or not.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

Row = dict[str, Any]
"""One measurement. Seconds are of a whole batch; `head` is None where the backbone is the flow. `groups`: in how many
networks were run, and how many there are; `steps`: likewise, of the flow or the diffusion."""

HEAD = f"{'':<26}{'batch':>5}{'ms/image':>12}{'speed':>8}{'backbone':>10}{'calls':>7}{'head':>7}{'calls':>7}{'rest':>6}"


def line(row: Row) -> str:
    whole, head = row["seconds"], row["head"] or 0.0
    spent = f"{'~' if row['extrapolated'] else ''}{1000 * whole / row['batch']:,.0f}"
    own = ("none", "") if row["head"] is None else (f"{head / whole:.0%}", row["head_calls"])
    (some, groups), (few, steps) = row["groups"], row["steps"]
    ran = f"{some} of {groups} groups, {few} of {steps} steps" if row["extrapolated"] else "all"
    parts = f"{row['backbone'] / whole:>10.0%}{row['backbone_calls']:>7}{own[0]:>7}{own[1]:>7}"
    rest = (whole - row["backbone"] - head) / whole
    return f"{row['what']:<26}{row['batch']:>5}{spent:>12}{row['speed']:>7.2f}x{parts}{rest:>6.0%}   {ran}"


class Probe:
    """Stands in for a model's `predict` while a batch is drawn: times the backbone (`predict`) and each evaluation of
    the flow or the diffusion, counts calls, and leaves networks out where they are not to be run.

    Args: groups, steps: in how many of each network are run; None is all.   expected: steps of a group.
    """

    def __init__(self, model: Any, groups: int | None, steps: int | None, expected: int, count: int) -> None:
        self.model, self.original, self.count = model, model.predict, count
        self.on_cuda = model.device.type == "cuda"
        self.wanted = min(groups or count, count)
        self.stride = max(1, expected // (steps or expected))
        self.backbone = getattr(model, "trunk", model)
        diffusion = getattr(model, "diffloss", None)  # its network is entered beside `forward`: its last layer tells
        self.head = getattr(model, "flownet", None) if diffusion is None else diffusion.net.final_layer
        self.predicted: list[tuple[bool, Any, Any]] = []  # of each group: run, from, to
        self.asked: list[list[tuple[str, bool, Any, Any]]] = []  # of each group and evaluation: kind, run, from, to
        self.entered: list[tuple[str, int, int]] = []  # network, rows, tokens
        self.faults: set[str] = set()
        self.passes, self.memory = 0, set[tuple[int, ...]]()

    def mark(self) -> Any:
        """Now: an event on CUDA, which is not waited for."""
        import torch

        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_wanted(self, group: int) -> bool:
        return group == self.stands_for(group)

    def stands_for(self, group: int) -> int:
        """The group in the middle of its share of the schedule."""
        share = group * self.wanted // self.count
        return ((2 * share + 1) * self.count) // (2 * self.wanted)

    def predict(self, state: Any, inputs: Any, positions: Any) -> Any:
        cache = getattr(state, "cache", None)
        if cache is not None:
            self.wanted = self.count  # it must see all groups
            self.memory.add(tuple(t.data_ptr() for t in (*cache.keys, *cache.values)))
        run = self.is_wanted(len(self.asked))
        self.tokens = positions.shape[-1] // self.model.positions_per_token
        began, self.entered = self.mark(), []
        predictive = self.original(state, inputs, positions) if run else self.blank(state)
        self.predicted.append((run, began, self.mark()))
        self.passes += len(self.entered) if run else 1
        self.asked.append([])
        batch = len(inputs)
        for kind in ("velocity", "denoise", "pair"):
            function = getattr(predictive, kind, None)
            if function is not None:
                setattr(predictive, kind, partial(self.ask, kind, function, run, batch))
        return predictive

    def blank(self, state: Any) -> Any:
        """In the place of a predictive whose network is not asked."""
        from varkit.heads.diffusion import Diffusion

        def never(x: Any, t: Any) -> Any:
            raise RuntimeError("this group is not run")

        return Diffusion(never, self.model.layout.dim, never if state.guided else None)

    def ask(self, kind: str, function: Callable[..., Any], run: bool, batch: int, x: Any, t: Any) -> Any:
        asked = self.asked[-1]
        new = all(kind != other for other, *_ in asked)
        run = run and (new or len(asked) % self.stride == self.stride // 2)
        began, self.entered = self.mark(), []
        if run:
            out = function(x, t)
            network = "backbone" if self.head is None else "head"
            rows = 2 * batch if kind == "pair" else batch
            if self.entered != [(network, rows, self.tokens)]:
                self.faults.add(f"an evaluation of {self.tokens} tokens of {rows} rows was {self.entered}")
        else:
            out = x.new_zeros(*x.shape[:-1], x.shape[-1] * (1 if hasattr(self.model, "trunk") else 2))
            out = (out, out) if kind == "pair" else out
        asked.append((kind, run, began, self.mark()))
        return out

    def seconds(self, began: Any, ended: Any) -> float:
        return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000

    def watch(self, draw: Callable[[], Any]) -> float:
        """Draw once; seconds by the clock."""
        import torch

        def enter(network: str, module: Any, given: Any) -> None:
            self.entered.append((network, given[0].shape[0], given[0].shape[1]))

        modules = {"backbone": self.backbone, "head": self.head}
        hooks = [m.register_forward_pre_hook(partial(enter, n)) for n, m in modules.items() if m is not None]
        self.model.predict = self.predict
        try:
            began = time.perf_counter()
            draw().tokens.cpu()
            if self.on_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - began
        finally:
            del self.model.predict
            for hook in hooks:
                hook.remove()

    def row(self, model: str, what: str, batch: int, wall: float) -> Row:
        """What `watch` saw, and what it would have taken in full."""
        spans = [(self.seconds(a, b), run) for run, a, b in self.predicted]
        every = [[(kind, run, self.seconds(a, b)) for kind, run, a, b in group] for group in self.asked]
        rest = wall - sum(s for s, _ in spans) - sum(s for group in every for *_, s in group)
        predicting = sum(s if run else spans[self.stands_for(g)][0] for g, (s, run) in enumerate(spans))
        means: dict[str, dict[int, float]] = defaultdict(dict)
        for g, group in enumerate(every):
            for kind in {kind for kind, run, _ in group if run}:
                ran = [s for other, run, s in group if other == kind and run]
                means[kind][g] = sum(ran) / len(ran)

        def usual(kind: str, g: int) -> float:
            alike, stand_in = means[kind], self.stands_for(g)
            return alike[min(alike, key=lambda other: abs(other - stand_in))]

        asking = sum(s if run else usual(kind, g) for g, group in enumerate(every) for kind, run, s in group)
        ran, total = (sum(run or whole for group in every for _, run, _ in group) for whole in (False, True))
        own = self.head is not None
        return {
            "model": model,
            "what": what,
            "batch": batch,
            "seconds": rest + predicting + asking,
            "backbone": predicting if own else predicting + asking,
            "head": asking if own else None,
            "backbone_calls": self.passes if own else self.passes + total,
            "head_calls": total if own else 0,
            "groups": (sum(run for _, run in spans), len(spans)),
            "steps": (ran, total),
            "extrapolated": ran < total or not all(run for _, run in spans),
        }


def variants(model: Any, settings: dict[str, Any], groups: int) -> dict[str, dict[str, Any]]:
    """Ways to be faster, by name: changes of the settings."""
    first = settings["head_steps"]
    first, last = (50, 5) if hasattr(model, "diffloss") else (first, min(15, first))
    found: dict[str, dict[str, Any]] = {}
    found[f"DiSA, {first} to {last} steps"] = {"head_steps": first, "head_steps_last": last}
    if settings["guidance_scale"] != 1:
        half = (groups // 2, groups - 1)
        found["guidance off"] = {"guidance_scale": 1.0}
        found["guided in groups {}-{}".format(*half)] = {"guidance_interval": half}
    return found


def prepare(name: str, device: str, dtype: str, tiny: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Model and tokenizer, and the settings of the release. Only the tokenizer's layout is used: it has no weights."""
    import torch

    from varkit.registry import checkpoint, create_model, list_checkpoints, model_entry
    from varkit.samplers.continuous import ContinuousSampler

    entry = model_entry(name)
    torch.manual_seed(0)
    model = entry.build(**(entry.tiny if tiny else {})).eval()
    for parameter in model.parameters():
        if not parameter.any():  # as after training
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.device("meta"):
        made = create_model(entry.tokenizer or "", **(entry.tiny_tokenizer if tiny else {}))
    tokenizer = model.tokenizer_for(made.to_empty(device=device).eval())
    released = list_checkpoints(f"{name}.*")
    settings = ContinuousSampler(**(checkpoint(released[0]).sampling if released else {})).settings()
    if settings["num_steps"] is not None:  # a tiny model has fewer tokens
        settings["num_steps"] = min(settings["num_steps"], model.layout.length // model.positions_per_token)
    return model.to(device, getattr(torch, dtype)), tokenizer, settings


def measure(name: str, batches: list[int], repeats: int, cut: tuple[int | None, int | None], options: Any) -> list[Row]:
    """All rows of a model. Prints each as it comes, unless `options` says json."""
    import torch

    from varkit import Rng
    from varkit.interfaces import Cond
    from varkit.layers.packed import can_pack, pack_linears
    from varkit.samplers.continuous import ContinuousSampler

    say = (lambda line: None) if options["json"] else typer.echo
    device, dtype = options["device"], options["dtype"]
    model, tokenizer, settings = prepare(name, device, dtype, options["tiny"])
    if not options["guidance"]:
        settings["guidance_scale"] = 1.0
    rng = Rng.from_seed(0, 1).to(device)
    count = len(model.groups(rng, settings["num_steps"]))
    told = ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None and k != "temperature")
    say(f"\n{name}: {count} groups; {told}")
    if hasattr(model, "trunk") and not hasattr(model, "flownet"):
        say("no head: the backbone is the flow; its calls are those of the flow and one for each entity read clean")
    say(HEAD + "   run")
    sampler, rows = ContinuousSampler(), list[Row]()

    def run(what: str, batch: int, changes: dict[str, Any]) -> None:
        labels = torch.arange(batch, device=device) * 7 % model.num_classes
        null = Cond(torch.full_like(labels, model.num_classes))
        given = (tokenizer, model, Cond(labels), Rng.from_seed(0, batch).to(device), null)
        found = []
        for turn in range(repeats + 1):
            (groups, steps), chosen = cut, {**settings, **changes}
            if turn == 0:  # warms up
                groups, steps, chosen = 2, 1, {**chosen, "head_steps": 2, "head_steps_last": None}
            probe = Probe(model, groups, steps, chosen["head_steps"], count)
            wall = probe.watch(partial(sampler.generate, *given, **chosen))
            if probe.faults or len(probe.memory) > 1:
                moved = ["keys and values moved"] if len(probe.memory) > 1 else []
                raise RuntimeError("; ".join([*sorted(probe.faults), *moved]))
            if turn:
                found.append(probe.row(name, what, batch, wall))
        row = sorted(found, key=lambda r: r["seconds"])[(len(found) - 1) // 2]
        row["speed"] = next((r["seconds"] for r in rows if r["batch"] == batch), row["seconds"]) / row["seconds"]
        rows.append(row)
        say(line(row))

    for batch in batches:
        run("as released" if options["guidance"] else "without guidance", batch, {})
        for what, changes in variants(model, settings, count).items() if options["variants"] else ():
            run(what, batch, changes)
    if options["variants"] and device == "cpu" and dtype == "float32" and can_pack():
        pack_linears(model)
        for batch in batches:
            run("optimize_decoding", batch, {})
    cache = "keys and values stayed in one place" if hasattr(model, "trunk") else "there is no cache"
    say(f"checked: an evaluation was one call of all tokens, both branches in one batch; {cache}")
    return rows


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Builders; by default mar_b xar_b flowar_s.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a row, after one to warm up; the median counts.")] = 1,
    guidance: Annotated[bool, typer.Option(help="As the release guides, or not at all.")] = True,
    groups: Annotated[
        int | None, typer.Option(min=2, help="Groups whose networks are run, where none is cached. CPU: 4; else all.")
    ] = None,
    head_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a group in which they are. CPU: 4; else all.")
    ] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Also rows of what makes it faster.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON, seconds a batch.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
) -> None:
    """Milliseconds an image, calls of the networks, where the time goes, and ratios against the released settings."""
    import torch

    from varkit.registry import model_entry

    names = models or ["mar_b", "xar_b", "flowar_s"]
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    for name in names:
        entry = model_entry(name)
        with torch.device("meta"):
            if getattr(entry.build(**entry.tiny), "sampler", "") != "ContinuousSampler":
                raise typer.BadParameter(f"{name} is no generator of latents; give such as mar_b, xar_b, flowar_s")
    few = 4 if device == "cpu" else None
    cut = (groups or few, head_steps or few)
    options = {"device": device, "dtype": dtype, "guidance": guidance, "variants": variants}
    options |= {"json": as_json, "tiny": tiny}
    if not as_json:
        typer.echo(f"{dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, random weights")
    sizes = [int(b) for b in batches.split(",")]
    rows = [row for name in names for row in measure(name, sizes, repeats, cut, options)]
    if as_json:
        typer.echo(json.dumps(rows))
    elif any(row["extrapolated"] for row in rows):
        typer.echo("~ extrapolated: the networks were run as often as the last column says, everything else in full")


if __name__ == "__main__":
    typer.run(main)
