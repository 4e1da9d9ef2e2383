"""What speculative decoding costs at official size, random weights, and what a pass must bring to be worth it.

    python benchmarks/speculative.py                     # LlamaGen-B, VAR-d16's scales; batch 1 and 4
    python benchmarks/speculative.py --quick --no-var    # fewer sizes, batch 1
    python benchmarks/speculative.py --model llamagen_l --threads 4

The baseline is plain decoding's call: one token (both branches under guidance), keys of half an image in the cache.
Rows are calls of the model over windows of n tokens and over trees; whole rounds of drafters and verifiers, of which
the drafter's and the verifier's share are in % of that round's own call of the model; and VAR's scales, which decide
n tokens a pass without any draft, against its own first scale. A pass that costs r times the baseline must bring r
tokens: that is the column `x plain`. Of a chain of L drafts, each accepted with probability a, a pass brings (1 -
a^(L+1)) / (1 - a); the last column is the a at which that is r, `never` where even a = 1 brings less.

Weights are random, so how many drafts are accepted here means nothing, and nothing is said of it. A verifier's time
grows with the levels that it walks; how many they were in the mean is in the table.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

Row = dict[str, Any]
"""One measurement: what, batch, ms a pass, `ratio` to the baseline of its model and batch. Of a window also `drafts`;
of a round `drafter`, `verifier` and `target`, ms, and `levels`."""

WINDOWS, TREES = (1, 2, 4, 8, 16, 32), (8, 16, 58)
ROUNDS = [(d, v) for d in ("sjd", "eagle-dynamic", "recycling") for v in ("exact", "bounded", "lantern")]
NEIGHBOURS = 1000


def needed_rate(tokens: float, drafts: int) -> float | None:
    """The rate of acceptance at which a chain of so many drafts brings so many tokens a pass; None: not even 1 does."""
    import torch

    from varkit.samplers.speculative.verifiers.laws import block_efficiency

    if tokens > drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        brought = float(block_efficiency(torch.tensor(rate, dtype=torch.float64), torch.tensor(drafts)))
        low, high = (rate, high) if brought < tokens else (low, rate)
    return high if tokens > 1 else 0.0


def markdown(rows: list[Row]) -> str:
    head = ["a pass", "batch", "ms", "x plain", "drafter", "verifier", "levels", "chain accepted at least"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        parts = [""] * 3
        if "drafter" in row:
            parts = [f"{row[k] / row['target']:.0%}" for k in ("drafter", "verifier")] + [f"{row['levels']:.1f}"]
        rate = ""
        if row.get("drafts"):
            needed = needed_rate(row["ratio"], row["drafts"])
            rate = "never" if needed is None else f"{needed:.0%}"
        lines.append([row["what"], str(row["batch"]), f"{row['ms']:.1f}", f"{row['ratio']:.2f}", *parts, rate])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Bench:
    """A model, half an image long, and the clock."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        import torch

        from varkit.registry import model_entry

        self.options, self.device = options, torch.device(options["device"])
        entry = model_entry(name)
        torch.manual_seed(0)
        self.model: Any = entry.build(**(entry.tiny if options["tiny"] else {})).eval()
        for parameter in self.model.parameters():
            if not parameter.any():  # a head that starts at zero gives flat laws, where all is accepted
                torch.nn.init.normal_(parameter, std=0.1)
        self.model = self.placed(self.model)
        self.guided, self.rows = options["guidance"], list[Row]()

    def placed(self, model: Any) -> Any:
        import torch

        model = model.to(self.device)
        return model if self.options["dtype"] == "float32" else model.to(dtype=getattr(torch, self.options["dtype"]))

    def synced(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def median_ms(self, call: Callable[[], Any]) -> float:
        times = []
        for _ in range(self.options["repeats"] + 1):  # the first warms up
            began = self.synced()
            call()
            times.append(self.synced() - began)
        return 1000 * statistics.median(times[1:])

    def add(self, what: str, batch: int, ms: float, **more: Any) -> None:
        first = next((r["ms"] for r in self.rows if r["batch"] == batch), ms)
        self.rows.append({"what": what, "batch": batch, "ms": ms, "ratio": ms / first, **more})
        typer.echo(f"{what}, batch {batch}: {ms:.1f} ms", err=True)

    def conditions(self, batch: int) -> tuple[Any, Any]:
        import torch

        from varkit.interfaces import Cond

        labels = torch.arange(batch, device=self.device) % self.model.num_classes
        return Cond(labels), Cond(torch.full_like(labels, self.model.num_classes)) if self.guided else None

    def target(self, batch: int) -> Any:
        import torch

        from varkit.samplers.processors import build_processors
        from varkit.samplers.speculative.target import Target

        order = torch.arange(self.model.layout.length, device=self.device)
        scales = torch.full(order.shape, 2.0 if self.guided else 1.0, device=self.device)
        return Target(self.model, *self.conditions(batch), order, scales, build_processors(top_k=self.options["top_k"]))

    # ---- calls of the model ---------------------------------------------------------------------------------------

    def calls(self, batch: int, windows: tuple[int, ...], trees: tuple[int, ...]) -> None:
        """Plain decoding's call, then windows and trees, all half an image in."""
        import torch

        target, half = self.target(batch), self.model.layout.length // 2
        size = target.vocabulary
        ids = torch.randint(0, size, (batch, half + 1 + max(*windows, *trees)), device=self.device)
        order = target.order
        plain = self.model.start(*self.conditions(batch))
        self.model.predict(plain, ids[:, :half], order[:half])
        self.model.append(plain, ids[:, :half], order[:half])
        turns = torch.full((batch, 1), half, device=self.device)

        def one() -> Any:
            return target.law(self.model.predict(plain, ids[:, half : half + 1], order[half : half + 1]), turns)

        self.add("plain: one token", batch, self.median_ms(one))
        target.first()
        target.begin(ids[:, 0], max(half, *windows, *trees))
        target.look(ids[:, : half - 1])
        target.commit(
            torch.arange(half - 1, device=self.device).expand(batch, -1), torch.full_like(turns[:, 0], half - 1)
        )
        for n in windows:
            ms = self.median_ms(partial(target.look, ids[:, :n]))
            self.add(f"window of {n}", batch, ms, drafts=n - 1)
        for n in trees:
            parents = (torch.arange(n, device=self.device) // 2).expand(batch, -1)  # each node has two children
            ms = self.median_ms(partial(target.look, ids[:, : n + 1], parents))
            self.add(f"tree of {n} nodes", batch, ms)

    # ---- whole rounds ---------------------------------------------------------------------------------------------

    def parts(self, drafter: str, verifier: str) -> tuple[Any, Any]:
        import torch

        from varkit.generators.eagle import Eagle
        from varkit.samplers.speculative.drafters import EagleDrafter
        from varkit.samplers.speculative.drafters.jacobi import Jacobi
        from varkit.samplers.speculative.drafters.recycling import Recycling
        from varkit.samplers.speculative.verifiers import OverCodes, build_verifier

        chosen: Any = build_verifier(verifier)
        if isinstance(chosen, OverCodes):  # any table costs the same; sorting a true one takes a minute
            size = self.model.layout.codebook_size
            table = (torch.arange(size)[:, None] + torch.arange(1, 1 + min(NEIGHBOURS, size - 1))) % size
            chosen.use_neighbours(table.to(self.device))
        if drafter == "sjd":
            return Jacobi(16), chosen
        if drafter == "recycling":
            return Recycling(), chosen
        return EagleDrafter(self.placed(Eagle.of(self.model).eval()), "dynamic"), chosen

    def round(self, drafter_name: str, verifier_name: str, batch: int, count: int) -> None:
        """The mean of `count` rounds at the start of an image, after one that is not counted."""
        import torch

        from varkit import Rng
        from varkit.samplers.speculative.drafters.recycling import Recycling
        from varkit.samplers.speculative.engine import Loop

        drafter, verifier = self.parts(drafter_name, verifier_name)
        spent, calls = defaultdict[str, float](float), defaultdict[str, int](int)

        def timed(part: str, owner: Any, method: str) -> None:
            inner = getattr(owner, method)

            def outer(*args: Any, **kwargs: Any) -> Any:
                began = self.synced()
                out = inner(*args, **kwargs)
                spent[part] += self.synced() - began
                calls[part] += 1
                return out

            setattr(owner, method, outer)

        with torch.no_grad():
            target = self.target(batch)
            drafter.check(target)
            loop = Loop(target, drafter, verifier, Rng.from_seed(0, batch).to(self.device))
            if isinstance(drafter, Recycling):  # a table that is full, as later in an image
                table = drafter.matrix.tokens
                drafter.matrix.tokens = torch.randint_like(table, target.vocabulary)
            timed("target", target, "look")
            timed("drafter", drafter, "propose")
            timed("drafter", drafter, "observe")
            timed("verifier", verifier, "step")
            whole, done = 0.0, 0
            while not loop.done and done <= count:
                if done == 1:
                    spent.clear()
                    calls.clear()
                began = self.synced()
                loop.round()
                whole, done = (whole if done else 0.0) + (self.synced() - began if done else 0.0), done + 1
        rounds = max(done - 1, 1)
        parts = {part: 1000 * spent[part] / rounds for part in ("target", "drafter", "verifier")}
        levels = calls["verifier"] / rounds
        self.add(f"{drafter_name}, {verifier_name}", batch, 1000 * whole / rounds, levels=levels, **parts)

    # ---- VAR ------------------------------------------------------------------------------------------------------

    def scales(self, batch: int) -> None:
        """A call of each scale, one after the other, as in drawing an image."""
        import torch

        state = self.model.start(*self.conditions(batch))
        like = next(self.model.parameters())
        for positions in self.model.schedule():
            n = len(positions)
            inputs = torch.zeros(batch, n, self.model.layout.dim, dtype=like.dtype, device=self.device)
            ms = self.median_ms(partial(self.model.predict, state, inputs, positions))
            self.model.append(state, torch.zeros(batch, n, dtype=torch.int64, device=self.device), positions)
            self.add(f"{self.options['var']}: scale of {n}", batch, ms)


def main(
    model: Annotated[str, typer.Option(help="A builder that decides one token a step.")] = "llamagen_b",
    var: Annotated[str, typer.Option(help="A builder of scales to set beside it.")] = "var_d16",
    with_var: Annotated[bool, typer.Option("--with-var/--no-var", help="Scales too.")] = True,
    batches: Annotated[str, typer.Option(help="Images at once, separated by commas.")] = "1,4",
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU; 0: as torch chooses.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Of each call, after one to warm up; the median counts.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Of each drafter and verifier, after one.")] = 3,
    guidance: Annotated[bool, typer.Option("--guidance/--no-guidance", help="Both branches in each call.")] = True,
    top_k: Annotated[int, typer.Option(min=0, help="Filter of the laws; 0 is none.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="One repeat, fewer rows, one batch size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
) -> None:
    """One table: what a pass costs beside plain decoding's call, and so what it must bring."""
    import torch

    from varkit.registry import model_entry
    from varkit.samplers.speculative.target import can_draft

    with torch.device("meta"):
        if not can_draft(model_entry(model).build(**model_entry(model).tiny)):
            raise typer.BadParameter(f"{model} does not decide one token a step; give such as llamagen_b")
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    if threads:
        torch.set_num_threads(threads)
    options = {"device": device, "dtype": dtype, "guidance": guidance, "top_k": top_k, "tiny": tiny, "var": var}
    options["repeats"] = repeats = 1 if quick else repeats
    sizes = [int(b) for b in batches.split(",")][: 1 if quick else None]
    windows, trees = ((1, 8), (16,)) if quick else (WINDOWS, TREES)
    rows = list[Row]()
    with torch.no_grad():
        bench = Bench(model, options)
        for batch in sizes:
            bench.calls(batch, windows, trees)
            for drafter, verifier in ROUNDS[::4] if quick else ROUNDS:
                bench.round(drafter, verifier, batch, 1 if quick else rounds)
        rows += bench.rows
        del bench
        if with_var:
            beside = Bench(var, options)
            beside.scales(sizes[0])
            rows += beside.rows
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo(markdown(rows))
    both = "both branches" if guidance else "one branch"
    typer.echo(
        f"\n{model}, {dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {both}, top-k "
        f"{top_k or 'off'}, random weights; x plain is against the first row of the model and batch: the tokens that a "
        f"pass must bring; drafter and verifier in % of the round's own call of the model"
    )


if __name__ == "__main__":
    typer.run(main)
