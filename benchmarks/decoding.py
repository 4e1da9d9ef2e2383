"""Decoding speed of LlamaGen at official size, random weights, beside an uncached loop and transformers' `generate`.

    python benchmarks/decoding.py                              # LlamaGen-B, 256 tokens, batch 1 and 8
    python benchmarks/decoding.py --tokens 64 --batches 1      # a shorter look

All rows run in one process, one after the other, and the median of `--repeats` counts. Nothing is guided and top_k is
off, so that each row does the same work: one prefix token, then N draws from 16384 codes. `generate` is that of a
LlamaForCausalLM with the same depth, heads, width and feed-forward width, with a static and with a dynamic cache; the
faster of the two is the baseline. "optimised" is after `optimize_decoding`: weights repacked on a CPU in float32, the
step of one token as a CUDA graph on CUDA.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer


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


def cached(model: Any, tokenizer: Any, labels: Any, count: int) -> Callable[[], Any]:
    """varkit's own sampler on the first `count` positions."""
    from varkit import NextGroupSampler, Rng
    from varkit.interfaces import Cond

    rng = Rng.from_seed(0, len(labels)).to(labels.device)
    sampler = NextGroupSampler(num_tokens=count)
    return lambda: sampler.generate(tokenizer, model, Cond(labels), rng)


def uncached(model: Any, labels: Any, count: int) -> Callable[[], Any]:
    """The whole sequence again for each token."""
    import torch

    @torch.no_grad()
    def run() -> Any:
        ids = torch.zeros(len(labels), 1, dtype=torch.int64, device=labels.device)
        for _ in range(count):
            probs = model(ids, labels)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
        return ids

    return run


def theirs(model: Any, labels: Any, count: int, cache: str) -> Callable[[], Any]:
    """`generate` of a Llama of the same shape. Raises ImportError without transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.codebook_size,
        hidden_size=c.hidden_size,
        intermediate_size=model.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        max_position_embeddings=count + 1,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).eval().to(labels.device, next(model.parameters()).dtype)
    prompt = labels[:, None]
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    # The graph of a static cache is not compiled here: no row is.
    return lambda: llama.generate(
        prompt, attention_mask=mask, cache_implementation=cache, disable_compile=True, **settings
    )


def main(
    name: Annotated[str, typer.Option(help="A LlamaGen builder conditioned on classes.")] = "llamagen_b",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens an image; 256 is a whole one at 256 px.")] = 256,
    uncached_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the uncached loop, batch 1; 0: none.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a row, after one to warm up.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Milliseconds an image, tokens a second, and ratios against the baselines."""
    import torch

    from varkit import create_model
    from varkit.pipelines.auto import assemble
    from varkit.registry import model_entry

    torch.manual_seed(0)
    model = create_model(name).eval().to(device, getattr(torch, dtype))
    torch.nn.init.normal_(model.output.weight, std=0.02)
    tokenizer = create_model(model_entry(name).tokenizer or "").eval().to(device)
    typer.echo(f"{name}, {dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    typer.echo(
        f"{'code':<34}{'batch':>5}{'tokens':>8}{'ms/image':>11}{'tokens/s':>10}{'varkit is':>11}{'optimised':>11}"
    )

    def row(code: str, batch: int, count: int, seconds: float, *ours: float) -> None:
        ratios = "".join(f"{seconds / own:>10.2f}x" for own in ours)
        told = f"{1000 * seconds / batch:>11.1f}{batch * count / seconds:>10.1f}"
        typer.echo(f"{code:<34}{batch:>5}{count:>8}{told}{ratios}")

    prepared = device == "cuda" or dtype == "float32"
    fast = create_model(name).eval().to(device, getattr(torch, dtype))
    fast.load_state_dict(model.state_dict())
    if prepared:
        assemble(fast, tokenizer, {}).optimize_decoding()
    for batch in (int(b) for b in batches.split(",")):
        labels = torch.arange(batch, device=device)
        plain = own = timed(cached(model, tokenizer, labels, tokens), repeats, device)
        row("varkit", batch, tokens, plain)
        if prepared:
            own = timed(cached(fast, tokenizer, labels, tokens), repeats, device)
            row("varkit, optimised", batch, tokens, own)
        for cache in ("static", "dynamic"):
            seconds = timed(theirs(model, labels, tokens, cache), repeats, device)
            row(f"transformers generate, {cache} cache", batch, tokens, seconds, plain, own)
        if batch == 1 and uncached_tokens:
            plain = own = timed(cached(model, tokenizer, labels, uncached_tokens), repeats, device)
            row("varkit", 1, uncached_tokens, plain)
            if prepared:
                own = timed(cached(fast, tokenizer, labels, uncached_tokens), repeats, device)
                row("varkit, optimised", 1, uncached_tokens, own)
            seconds = timed(uncached(model, labels, uncached_tokens), repeats, device)
            row("no cache", 1, uncached_tokens, seconds, plain, own)


if __name__ == "__main__":
    typer.run(main)
