"""Speed, memory and agreement of FID beside pytorch-fid and torch-fidelity, same weights, same images, in one run.

    pip install -e ".[bench]"
    python benchmarks/evaluation.py                                  # random weights: the answers must still agree
    python benchmarks/evaluation.py --weights pt_inception-2015-12-05-6726825d.pth --images 5000

Each row is a process of its own, so that its peak memory is its own; the tools take turns, and medians are printed.
pytorch-fid resizes otherwise than torch-fidelity, so varkit answers each by that tool's protocol. varkit computes no
intervals here, as the others have none.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

PROTOCOLS = {"pytorch-fid": "pytorch-fid", "torch-fidelity": "torch-fidelity"}
FILE = "pt_inception-2015-12-05-6726825d.pth"


def make_images(folder: Path, count: int, size: int, seed: int) -> None:
    """Smooth random colour pictures as PNG files; another seed gives another distribution."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = rng.integers(0, 256, (8 + 4 * seed, 8 + 4 * seed, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noisy = np.asarray(image, dtype=np.int16) + rng.integers(-12, 13, (size, size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


def make_weights(path: Path) -> None:
    """Random weights that keep activations alive, under the released file's names."""
    import torch

    from varkit.metrics.inception import InceptionV3

    torch.manual_seed(0)
    state = InceptionV3().state_dict()
    for key, value in state.items():
        if value.ndim > 1:
            torch.nn.init.kaiming_normal_(value)
        elif key.endswith(("bn.weight", "running_var")):
            value.fill_(1)
        elif value.is_floating_point():
            value.zero_()
    torch.save(state, path)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def worker(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one tool in this process: stages first, or the whole."""
    import torch

    torch.set_num_threads(spec["threads"])
    run = {"varkit": run_varkit, "pytorch-fid": run_pytorch_fid, "torch-fidelity": run_torch_fidelity}[spec["tool"]]
    result = run(spec)
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def run_varkit(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from varkit.metrics.collect import Wanted, collect
    from varkit.metrics.evaluate import evaluate
    from varkit.metrics.fid import frechet_distance
    from varkit.metrics.networks import open_network
    from varkit.metrics.protocol import load_protocol
    from varkit.metrics.reference import statistics_settings
    from varkit.metrics.sets import stored_set

    a, b = spec["folders"]
    if spec["what"] == "stages":
        protocol = load_protocol(spec["protocol"], num=spec["images"], metrics=["fid"])
        network = open_network(protocol, spec["weights"], torch.device("cpu"))
        sets = [stored_set(a), stored_set(b)]
        every = range(spec["images"])
        decode, _ = timed(lambda: [len(x) for x in sets[0].batches(every, spec["batch"])])
        wanted = Wanted({"features": statistics_settings(protocol)})
        options = {"batch_size": spec["batch"], "device": torch.device("cpu")}
        features, first = timed(lambda: collect(network, sets[0], every, wanted, **options))
        second = collect(network, sets[1], every, wanted, **options)
        pair = [x.statistics["features"] for x in (first, second)]
        distance, value = timed(lambda: frechet_distance(*pair))
        return {"decode": decode, "features": features, "distance": distance, "value": value}
    options = {"num": spec["images"], "metrics": ["fid"], "weights": spec["weights"], "device": "cpu"}
    options |= {"batch_size": spec["batch"], "overrides": ["interval=null"]}

    def score() -> float:
        return evaluate(a, b, protocol=spec["protocol"], cache=True, **options).results[0].score("frechet").value

    total, value = timed(score)  # the cache is empty
    cached, again = timed(score)
    return {"total": total, "cached": cached, "value": value, "cached_value": again}


def run_pytorch_fid(spec: dict[str, Any]) -> dict[str, Any]:
    from pytorch_fid import fid_score
    from pytorch_fid.inception import InceptionV3

    a, b = spec["folders"]
    files = [sorted(Path(f).glob("*.png")) for f in (a, b)]
    if spec["what"] == "stages":
        model = InceptionV3([3]).eval()
        data = fid_score.ImagePathDataset(files[0], transforms=fid_score.TF.ToTensor())
        decode, _ = timed(lambda: [data[i] for i in range(len(data))])
        options = {"batch_size": spec["batch"], "num_workers": 0}
        features, first = timed(lambda: fid_score.calculate_activation_statistics(files[0], model, **options))
        second = fid_score.calculate_activation_statistics(files[1], model, **options)
        distance, value = timed(lambda: fid_score.calculate_frechet_distance(*first, *second))
        return {"decode": decode, "features": features, "distance": distance, "value": float(value)}
    total, value = timed(lambda: fid_score.calculate_fid_given_paths([a, b], spec["batch"], "cpu", 2048, num_workers=0))
    stored = os.path.join(spec["work"], "reference.npz")
    if not os.path.exists(stored):
        fid_score.save_fid_stats([b, stored], spec["batch"], "cpu", 2048, num_workers=0)
    cached, _ = timed(
        lambda: fid_score.calculate_fid_given_paths([a, stored], spec["batch"], "cpu", 2048, num_workers=0)
    )
    return {"total": total, "cached": cached, "value": float(value)}


def run_torch_fidelity(spec: dict[str, Any]) -> dict[str, Any]:
    import torch_fidelity
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    a, b = spec["folders"]
    options = {
        "cuda": False,
        "batch_size": spec["batch"],
        "verbose": False,
        "feature_extractor_weights_path": spec["weights"],
        "cache_root": os.path.join(spec["work"], "fidelity"),
    }
    if spec["what"] == "stages":
        extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options)
        features, first = timed(lambda: extract_featuresdict_from_input_id(1, extractor, input1=a, **options))
        second = extract_featuresdict_from_input_id(1, extractor, input1=b, **options)
        pair = [fid_features_to_statistics(x["2048"]) for x in (first, second)]
        distance, value = timed(lambda: fid_statistics_to_metric(*pair, False))
        return {"features": features, "distance": distance, "value": next(iter(value.values()))}
    name = "frechet_inception_distance"
    total, value = timed(lambda: torch_fidelity.calculate_metrics(input1=a, input2=b, fid=True, cache=False, **options))
    keep = {"cache": True, "input2_cache_name": "reference"}
    torch_fidelity.calculate_metrics(input1=a, input2=b, fid=True, **keep, **options)
    cached, _ = timed(lambda: torch_fidelity.calculate_metrics(input1=a, input2=b, fid=True, **keep, **options))
    return {"total": total, "cached": cached, "value": value[name]}


def distances(threads: int) -> None:
    """The distance alone, of random features of 2048 dimensions: at full rank and with fewer samples."""
    import numpy as np
    import torch
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    from varkit.metrics.fid import FeatureStatistics, frechet_distance

    torch.set_num_threads(threads)
    print("\nThe distance alone, 2048 dimensions, seconds (ratio to varkit) and value:")
    print("| samples | varkit | varkit, reference kept | pytorch-fid | torch-fidelity |\n|---|---|---|---|---|")
    for count in (6000, 1000):
        rng = np.random.default_rng(0)
        mixing = rng.standard_normal((256, 2048)) * np.linspace(1, 0.05, 256)[:, None]
        both = []
        for shift in (0.0, 0.3):
            x = rng.standard_normal((count, 256)) @ mixing * 0.1 + 0.1 * rng.standard_normal((count, 2048)) + shift
            both.append(np.maximum(x, 0).astype(np.float32))
        ours = []
        for x in both:
            ours.append(FeatureStatistics(2048))
            ours[-1].update(torch.from_numpy(x))
        moments = [(x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)) for x in both]
        mine, value = timed(lambda ours=ours: frechet_distance(*ours))
        kept = ours[1].gaussian()
        again, _ = timed(lambda ours=ours, kept=kept: frechet_distance(ours[0], kept))
        roots, second = timed(lambda m=moments: calculate_frechet_distance(*m[0], *m[1]))
        pair = [{"mu": m, "sigma": s} for m, s in moments]
        eigen, third = timed(lambda pair=pair: fid_statistics_to_metric(*pair, False))
        print(
            f"| {count} | {mine:.2f}: {value:.8f} | {again:.2f} | {roots:.2f} ({roots / mine:.1f}x): {second:.8f} "
            f"| {eigen:.2f} ({eigen / mine:.1f}x): {next(iter(third.values())):.8f} |"
        )


def main(
    images: Annotated[int, typer.Option(min=2, help="Images of each set.")] = 200,
    size: Annotated[int, typer.Option(help="Their side.")] = 256,
    weights: Annotated[Path | None, typer.Option(help="The Inception file. Default: random weights.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each tool.")] = 3,
    batch: Annotated[int, typer.Option(help="Images in the network at once.")] = 32,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = os.cpu_count() or 1,
    work: Annotated[Path | None, typer.Option(help="Keep images and weights here.")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table of seconds, memory and answers."""
    if only is not None:
        typer.echo("RESULT " + json.dumps(worker(json.loads(only))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).absolute()
        hub = folder / "hub" / "checkpoints"
        hub.mkdir(parents=True, exist_ok=True)
        if not (hub / FILE).is_file():
            if weights is not None:
                os.symlink(weights.absolute(), hub / FILE)
            else:
                make_weights(hub / FILE)
        folders = [folder / f"set-{i}-{images}-{size}" for i in (1, 2)]
        for i, one in enumerate(folders):
            if not one.is_dir():
                make_images(one, images, size, i + 1)
        rows = [("pytorch-fid", "pytorch-fid"), ("varkit", "pytorch-fid")]
        rows += [("torch-fidelity", "torch-fidelity"), ("varkit", "torch-fidelity")]
        found: dict[tuple[str, str], dict[str, list[float]]] = {row: {} for row in rows}
        for turn in range(repeats):
            for tool, protocol in rows:
                for what in ("stages", "whole"):
                    spec = {
                        "tool": tool, "protocol": protocol, "what": what, "folders": list(map(str, folders)),
                        "images": images, "weights": str(hub / FILE), "batch": batch, "threads": threads,
                        "work": str(folder),
                    }  # fmt: skip
                    environment = os.environ | {"TORCH_HOME": str(folder), "OMP_NUM_THREADS": str(threads)}
                    environment["XDG_CACHE_HOME"] = str(folder / f"cache-{turn}-{protocol}-{what}")
                    command = [sys.executable, __file__, "--only", json.dumps(spec)]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                    line = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                    if not line:
                        raise SystemExit(f"{tool} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                    for key, value in json.loads(line[0][7:]).items():
                        found[tool, protocol].setdefault(f"{what} {key}", []).append(value)
        report(found, images, size, threads)
        distances(threads)


def report(found: dict[tuple[str, str], dict[str, list[float]]], images: int, size: int, threads: int) -> None:
    columns = ["stages decode", "stages features", "stages distance", "whole total", "whole cached", "whole peak_mib"]
    print(
        f"{images} images of {size}x{size} a set, {threads} threads; medians, seconds; ratios: baseline over varkit\n"
    )
    print("| tool | decode | features | distance | total | reference cached | peak MiB | answer |\n" + "|---" * 8 + "|")
    for (tool, protocol), values in found.items():
        cells = [f"{statistics.median(values[c]):.2f}" if c in values else "-" for c in columns]
        name = tool if tool != "varkit" else f"varkit ({protocol})"
        print(f"| {name} | {' | '.join(cells)} | {values['whole value'][0]:.6f} |")
    for baseline, protocol in PROTOCOLS.items():
        theirs, ours = found[baseline, protocol], found["varkit", protocol]
        middle = {c: (statistics.median(theirs[c]), statistics.median(ours[c])) for c in columns if c in theirs}
        ratios = ", ".join(f"{c.split()[1]} {a / b:.2f}x" for c, (a, b) in middle.items())
        no_cache = statistics.median(theirs["whole total"]) / statistics.median(ours["whole cached"])
        apart = abs(ours["whole value"][0] / theirs["whole value"][0] - 1)
        print(f"\nvarkit beside {baseline}: {ratios}; its total over ours with a cached reference {no_cache:.2f}x")
        print(f"answers differ by {apart:.1e} (relative)")


if __name__ == "__main__":
    typer.run(main)
