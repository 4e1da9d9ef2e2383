"""How fast NBP draws clips by its block size, beside drawing them token by token, random weights.

    python benchmarks/video_blocks.py                                      # the small model of moving garments
    python benchmarks/video_blocks.py --name nbp_ucf_base --batches 1      # released size: 17 frames of 128x128
    python benchmarks/video_blocks.py --blocks token,row,frame,16 --guided

All rows are one network, but for the learned tokens before the first block, in one process, and the median of
`--repeats` counts. The row `token` is next-token prediction at equal size, which the others are compared with. A
model of texts or of given frames is made one of classes, so that each draws all tokens of its clips. What the
tokenizer takes to decode them is the same for all, and told by itself; frames a second are without it, and with it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

CLASSES: dict[str, Any] = {
    "num_classes": 10,
    "text_length": 0,
    "text_vocab": 0,
    "max_positions": None,
    "first": "begin",
}
"""What makes a released model one of classes."""


def timed(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median seconds, after one run to warm up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def drawing(model: Any, tokenizer: Any, batch: int, guided: bool, device: str) -> Callable[[], Any]:
    """One batch of clips, as tokens."""
    import torch

    from varkit import NextGroupSampler, Rng
    from varkit.interfaces import Cond

    labels = torch.arange(batch, device=device) % model.num_classes
    null = Cond(torch.full_like(labels, model.num_classes)) if guided else None
    sampler = NextGroupSampler(guidance_scale=2.0 if guided else 1.0, guidance_schedule="constant")
    rng = Rng.from_seed(0, batch).to(torch.device(device))
    return lambda: sampler.generate(tokenizer, model, Cond(labels), rng, null=null)


def main(
    name: Annotated[str, typer.Option(help="An NBP builder.")] = "nbp_moving_fashion",
    blocks: Annotated[str, typer.Option(help="token, row, frame or numbers, separated by commas.")] = "token,row,frame",
    batches: Annotated[str, typer.Option(help="Clips at once, separated by commas.")] = "1,8",
    guided: Annotated[bool, typer.Option("--guided", help="With guidance: two rows a clip.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a row, after one to warm up.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Seconds a clip, frames a second, and how many times faster than token by token."""
    import torch

    from varkit import create_model
    from varkit.registry import model_entry

    torch.manual_seed(0)
    place = {"device": device} | ({} if dtype == "float32" else {"dtype": getattr(torch, dtype)})
    names = ["token", *[b for b in blocks.split(",") if b not in ("token", "1")]]
    tokenizer = create_model(model_entry(name).tokenizer or "").eval().to(**place)
    frames = tokenizer.num_frames
    typer.echo(f"{name}, {dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    typer.echo(f"{'block':<8}{'batch':>6}{'steps':>7}{'s/clip':>9}{'frames/s':>10}{'decoded':>9}{'faster':>9}")
    for batch in map(int, batches.split(",")):
        tokens = torch.zeros(batch, tokenizer.layout.length, dtype=torch.int64, device=device)
        with torch.inference_mode():
            decoding = timed(lambda t=tokens: tokenizer.decode(t), repeats, device)
        baseline = 0.0
        for block in names:
            model = create_model(name, block=int(block) if block.isdigit() else block, **CLASSES)
            model = model.eval().to(**place)
            seconds = timed(drawing(model, tokenizer, batch, guided, device), repeats, device)
            baseline = baseline or seconds
            both = (batch * frames / s for s in (seconds, seconds + decoding))
            told = "{:>10.2f}{:>9.2f}".format(*both)
            steps = len(model.schedule())
            typer.echo(f"{block:<8}{batch:>6}{steps:>7}{seconds / batch:>9.3f}{told}{baseline / seconds:>8.2f}x")
            del model
        typer.echo(f"decoding a clip of {frames} frames: {decoding / batch:.3f} s")


if __name__ == "__main__":
    typer.run(main)
