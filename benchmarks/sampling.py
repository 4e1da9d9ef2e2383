"""Sampling speed and memory of VAR at official size, random weights, beside a named baseline.

    python benchmarks/sampling.py                          # varkit alone; float32 at batch 1 is the baseline
    python benchmarks/sampling.py --official DIR           # DIR: a checkout of FoundationVision/VAR, run beside it

Each row is a process of its own, so that its peak memory is its own. Sampling settings are those of the official
README (cfg 1.5, top_k 900, top_p 0.96). With --official both run the same weights; the last line compares greedy
images. The official code runs bf16 under autocast, as its demo does; varkit holds bf16 weights.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def load_official_code(checkout: str, depth: int, device: str) -> tuple[Any, Any]:
    """The official tokenizer and transformer, lively random weights under a fixed seed."""
    import torch

    sys.path.insert(0, checkout)
    from models import build_vae_var

    torch.manual_seed(0)
    tokenizer, transformer = build_vae_var(device="cpu", depth=depth)
    for module in (tokenizer, transformer):
        module.eval()
        for name, parameter in module.named_parameters():
            scale = 0.02 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=scale)
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.ones_(parameter)
    return tokenizer.to(device), transformer.to(device)


def worker(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one row in this process."""
    import torch

    device, batch, bf16 = spec["device"], spec["batch"], spec["dtype"] == "bfloat16"
    labels = torch.arange(batch) * 7 % 1000
    if spec["code"] == "official":
        tokenizer, transformer = load_official_code(spec["official"], spec["depth"], device)
        if not spec["measure"]:
            torch.save(tokenizer.state_dict(), spec["folder"] + "/vae.pth")
            torch.save(transformer.state_dict(), spec["folder"] + "/var.pth")

        def sample(top_k: int) -> Any:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                settings = {"g_seed": 0, "cfg": 1.5, "top_k": top_k, "top_p": 0.96 if top_k > 1 else 0.0}
                return transformer.autoregressive_infer_cfg(batch, labels.to(device), **settings)
    else:
        from varkit import AutoPipeline
        from varkit.pipelines.auto import create_pipeline

        if spec["official"]:
            pipeline = AutoPipeline.from_single_file(spec["folder"] + "/var.pth", spec["folder"] + "/vae.pth")
        else:
            torch.manual_seed(0)
            pipeline = create_pipeline(f"var_d{spec['depth']}")
        pipeline.to(device, torch.bfloat16 if bf16 else torch.float32)
        pipeline.set_progress_bar_config(disable=True)

        def sample(top_k: int) -> Any:
            top_p = 0.96 if top_k > 1 else 1.0
            settings = {"guidance_scale": 2.5, "guidance_schedule": "linear", "top_k": top_k, "top_p": top_p}
            return pipeline(labels.tolist(), seed=0, output_type="pt", **settings).images

    if not spec["measure"]:
        torch.save(sample(1).float().cpu(), f"{spec['folder']}/{spec['code']}.pt")
        return {}
    times = []
    for _ in range(spec["repeats"] + 1):  # the first warms up
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        sample(900).cpu()
        times.append(time.perf_counter() - began)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": sorted(times[1:])[len(times[1:]) // 2] / batch, "peak_gib": peak}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(
    official: Annotated[str | None, typer.Option(help="A checkout of FoundationVision/VAR to measure beside.")] = None,
    depth: Annotated[int, typer.Option(help="16, 20, 24 or 30.")] = 16,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, separated by commas.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(help="Timed runs a row, after one to warm up; the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    worker_spec: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Seconds an image and peak memory; ratios against the baseline."""
    if worker_spec is not None:
        typer.echo(json.dumps(worker(json.loads(worker_spec))))
        return
    import torch

    typer.echo(f"VAR-d{depth}, 256x256, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        common = {"official": official, "depth": depth, "device": device, "folder": folder, "repeats": repeats}
        codes = ["official", "varkit"] if official else ["varkit"]
        if official:
            for code in codes:
                run({**common, "code": code, "batch": 2, "dtype": "float32", "measure": False})
        typer.echo(f"{'code':<10}{'dtype':<10}{'batch':>5}{'s/image':>10}{'peak GiB':>10}{'speed':>8}")
        first: float | None = None
        for dtype in dtypes.split(","):
            for batch in (int(b) for b in batches.split(",")):
                for code in codes:
                    row = run({**common, "code": code, "batch": batch, "dtype": dtype, "measure": True})
                    if first is None or code == "official":
                        first = row["seconds"]
                    told = f"{row['seconds']:>10.3f}{row['peak_gib']:>10.2f}{first / row['seconds']:>7.2f}x"
                    typer.echo(f"{code:<10}{dtype:<10}{batch:>5}{told}")
        typer.echo("speed: against " + ("the official code of the row above" if official else "the first row"))
        if official:
            a, b = (torch.load(Path(folder) / f"{code}.pt", weights_only=True) for code in codes)
            typer.echo(f"greedy images, float32: largest difference {(a - b).abs().max():.2e} of a range of 1")


if __name__ == "__main__":
    typer.run(main)
