"""Reconstructions beside their originals: rFID, PSNR, SSIM, LPIPS, use of the codebook; at one length or several.

The reference is the very images that were reconstructed. Against the training set the same tokenizer scores two or
three points worse, which is the usual reason why published numbers seem not to reproduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from varkit import registry
from varkit.data.clips import CLIP_DATASETS
from varkit.data.images import DATASETS
from varkit.metrics.checks import check_images
from varkit.metrics.clip_pairs import Back, channels_first, clip_pairs, pictured
from varkit.metrics.collect import Collected, process
from varkit.metrics.evaluate import SHEET, Options, add_curves, new_report
from varkit.metrics.fid import FeatureStatistics, frechet_contributions, frechet_distance
from varkit.metrics.interval import bootstrap_interval
from varkit.metrics.lpips import LPIPS, find_lpips
from varkit.metrics.networks import FeatureNetwork, open_network
from varkit.metrics.protocol import Protocol
from varkit.metrics.reconstruction import CodebookUse, ReconstructionMetrics, takes_lengths
from varkit.metrics.reference import Reference, reference_of, statistics_settings
from varkit.metrics.report import Report, Result, Score
from varkit.metrics.sets import ImageSet
from varkit.metrics.sources import is_model, open_set
from varkit.metrics.structural import SMALLEST_MULTI_SCALE, SSIM_DEFAULT
from varkit.pictures import grid, to_pil, to_uint8
from varkit.pipelines.auto import open_tokenizer
from varkit.rng import Rng

HOW = {
    "psnr": ("PSNR", "higher", "dB, mean over images, 8 bits"),
    "ssim": ("SSIM", "higher", "Gaussian window of 11, sigma 1.5, inside the image, mean over channels"),
    "ms-ssim": ("MS-SSIM", "higher", "five scales, weights of Wang et al."),
    "lpips-alex": ("LPIPS (alex)", "lower", "AlexNet, version 0.1, mean over images"),
    "lpips-vgg": ("LPIPS (vgg)", "lower", "VGG-16, version 0.1, mean over images"),
    "lpips-squeeze": ("LPIPS (squeeze)", "lower", "SqueezeNet 1.1, version 0.1, mean over images"),
}

CLIPS_HOW = {"psnr": "dB, of the error of a whole clip, mean over clips, 8 bits"}


def evaluate_reconstructions(
    generated: Any,
    reference: Any,
    protocol: Protocol,
    options: Options,
    *,
    split: str | None = None,
    root: str | None = None,
    lengths: Sequence[int] = (),
) -> Report:
    """As `varkit.metrics.evaluate.evaluate`, for a protocol of reconstructions.

    Args:
        generated: a tokenizer (a model's, its folder, a released checkpoint), or reconstructions in the order of the
            originals.   reference: the originals; of a named data set the test split, unless `split` says otherwise.
        lengths: tokens to decode from; each is a result.
    """
    where = options.where
    distance = "frechet" in protocol.metrics
    network = open_network(protocol, options.weights, where, download=options.download) if distance else None
    tokenizer = _tokenizer(generated)
    named = isinstance(reference, str) and reference in (*DATASETS, *CLIP_DATASETS)
    split = split or ("test" if named else None)
    if tokenizer is not None:
        _check_lengths(tokenizer, lengths)
    elif lengths:
        raise ValueError("lengths need a tokenizer; reconstructions that are there have one length")
    opening = {"split": split, "root": root}
    if protocol.kind == "video-reconstruction":
        originals, back, name = clip_pairs(generated, tokenizer, reference, protocol, where, **opening)
    else:
        originals, back, name = _image_pairs(generated, tokenizer, reference, protocol, where, lengths, **opening)
    check_images(originals, originals, protocol, network, None)
    lpips = _lpips(protocol, originals, options)
    found = (
        None
        if network is None
        else reference_of(originals, protocol, network, rows=False, cache=options.cache, **options.running)
    )
    seen = _run(originals, back, network, protocol, lpips, options, _layout(tokenizer, protocol))
    plain = Reference(originals.source, originals.kind, originals.hash(), len(originals))
    report = new_report(protocol, [network], found or plain, options)
    report.networks |= {f"lpips-{m.trunk}": {"what": f"LPIPS on {m.trunk}"} for m in lpips}
    for length, one in seen.items():
        report.results.append(_result(name, length, one, originals, protocol, network, found))
    add_curves(report.results)
    return report


def _image_pairs(
    generated: Any,
    tokenizer: Any | None,
    reference: Any,
    protocol: Protocol,
    device: torch.device,
    lengths: Sequence[int],
    split: str | None,
    root: str | None,
) -> tuple[ImageSet, Back, str]:
    """The originals, how to get what is compared with them, and what that is called."""
    opening: dict[str, Any] = {"split": split, "root": root, "fit": protocol.images.fit}
    if tokenizer is None:
        given = open_set(generated, protocol, generated=True)
        originals = open_set(reference, protocol, size=given.size, **opening)
        check_images(originals, originals, protocol, None, None)
        check_images(given, originals, protocol, None, None)
        return originals, _given(given), given.name
    if getattr(tokenizer, "num_frames", None) is not None:
        raise ValueError(f"{type(tokenizer).__name__} codes clips; {protocol.name} scores images (docs/video.md)")
    originals = open_set(reference, protocol, size=tuple(tokenizer.image_size), **opening)
    name = str(generated if isinstance(generated, str | Path) else type(tokenizer).__name__)
    tokenizer.to(device)
    return originals, _through(tokenizer, device, protocol, lengths), name


def _tokenizer(source: Any) -> Any | None:
    """A tokenizer, where the source is one or has one."""
    if hasattr(source, "encode") and hasattr(source, "decode"):
        return source.eval()
    if hasattr(source, "image_tokenizer"):
        return source.image_tokenizer
    named = isinstance(source, str | Path)
    if named and (
        is_model(source) or (Path(source) / "config.json").is_file() or str(source) in registry.list_checkpoints()
    ):
        return open_tokenizer(str(source)).eval()
    return None


def _check_lengths(tokenizer: Any, lengths: Sequence[int]) -> None:
    if lengths and not takes_lengths(tokenizer):
        raise ValueError(f"{type(tokenizer).__name__} always decodes all of its tokens; lengths need a flexible one")
    longest = tokenizer.layout.length
    if not all(1 <= n <= longest for n in lengths):
        raise ValueError(f"lengths must be in 1 .. {longest}; got {', '.join(map(str, lengths))}")


def _lpips(protocol: Protocol, originals: ImageSet, options: Options) -> list[LPIPS]:
    """The perceptual networks, on their device. Raises: FileNotFoundError; ValueError for images too small."""
    smallest = {"ms-ssim": SMALLEST_MULTI_SCALE, "ssim": SSIM_DEFAULT["window_size"]}
    models = []
    for metric in protocol.metrics:
        if metric.startswith("lpips-"):
            model = find_lpips("auto", metric.removeprefix("lpips-"), download=options.download)  # type: ignore[arg-type]
            if model is None:
                raise FileNotFoundError(f"the weights of {metric} could not be fetched")
            models.append(model.to(options.where))
            smallest[metric] = model.smallest
    for metric in protocol.metrics:
        height, width = originals.size[-2:]
        if min(height, width) < smallest.get(metric, 0):
            raise ValueError(
                f"{metric} needs {smallest[metric]} pixels a side; images are {height}x{width}. Leave it out"
            )
    return models


def _layout(tokenizer: Any | None, protocol: Protocol) -> Any | None:
    """Of the codes to count."""
    if tokenizer is None or "codebook" not in protocol.metrics or tokenizer.layout.codebook_size is None:
        return None
    return tokenizer.layout


def _through(tokenizer: Any, device: torch.device, protocol: Protocol, lengths: Sequence[int]) -> Back:
    """The noise of tokenizers that decode from noise is the image's own, and the same at every length."""

    def back(images: Tensor, indices: Sequence[int]) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
        tokens = tokenizer.encode(images.to(device).float().div(127.5).sub(1))
        rng = Rng.for_keys(protocol.sampling.seed, torch.tensor(list(indices))).to(device)
        for n in lengths or (None,):
            made = tokenizer.decode(tokens, rng, **({} if n is None else {"lengths": n}))
            yield n, to_uint8(made.float(), protocol.images.quantise), tokens

    return back


def _given(images: ImageSet) -> Back:
    def back(originals: Tensor, indices: Sequence[int]) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
        yield None, images.read(indices), None

    return back


class Seen:
    """What one length showed."""

    def __init__(self, lpips: Sequence[LPIPS], layout: Any | None) -> None:
        self.made = Collected()
        self.metrics = ReconstructionMetrics(lpips)
        self.use = None if layout is None else CodebookUse(layout)
        self.per_image: dict[str, Tensor] = {}
        self.rows: list[Tensor] = []  # features, batch by batch

    def take(self, features: Tensor, protocol: Protocol) -> None:
        """Features (B, D) of reconstructions; single ones are kept for the interval."""
        if "features" not in self.made.statistics:
            pooled = FeatureStatistics(features.shape[1], **statistics_settings(protocol))
            self.made.statistics["features"] = pooled
        self.made.statistics["features"].update(features)
        if protocol.interval is not None:
            self.rows.append(features.float())

    def merge(self, other: Seen) -> None:
        """Add what the next process saw."""
        self.made.merge(other.made)
        self.per_image = {k: torch.cat([v, other.per_image[k]]) for k, v in self.per_image.items()}
        if self.use is not None and other.use is not None:
            self.use.merge(other.use)


@torch.no_grad()
def _run(
    originals: ImageSet,
    back: Back,
    network: FeatureNetwork | None,
    protocol: Protocol,
    lpips: Sequence[LPIPS],
    options: Options,
    layout: Any | None,
) -> dict[int | None, Seen]:
    rank, world = process()
    start, stop = rank * len(originals) // world, (rank + 1) * len(originals) // world
    found: dict[int | None, Seen] = {}
    shown = {round(i * (len(originals) - 1) / (SHEET // 2 - 1)) for i in range(SHEET // 2)}
    position = start
    with tqdm(total=stop - start, unit="image", desc="pairs", disable=not (options.progress and rank == 0)) as bar:
        for batch in originals.batches(range(start, stop), options.batch_size):
            indices = range(position, position + len(batch))
            for length, made, ids in back(batch, indices):
                one = found.setdefault(length, Seen(lpips, layout))
                one.metrics.update(channels_first(made), channels_first(batch).to(made.device))
                if one.use is not None and ids is not None:
                    one.use.update(ids[:, :length], first=length is not None)
                if network is not None:
                    one.take(network(made.to(options.where), ["features"])["features"].detach().cpu(), protocol)
                for i in shown.intersection(indices):
                    pair = (pictured(batch[i - position]), pictured(made[i - position].cpu()))
                    one.made.pictures[i] = torch.cat(pair, 2)
                one.made.num += len(batch)
            position += len(batch)
            bar.update(len(batch))
    for one in found.values():
        one.per_image = one.metrics.compute()["per_image"]
        one.metrics = ReconstructionMetrics()  # its networks need not travel
        if one.rows:
            one.made.rows["features"], one.rows = torch.cat(one.rows), []
    return _gathered(found)


def _gathered(found: dict[int | None, Seen]) -> dict[int | None, Seen]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    first: dict[int | None, Seen] = everyone[0]
    for other in everyone[1:]:
        for length, one in other.items():
            first[length].merge(one)
    return first


def _interval(value: float, contributions: Tensor, protocol: Protocol) -> tuple[float | None, float | None]:
    rule = protocol.interval
    if rule is None or not contributions.isfinite().all():
        return None, None
    low, high = bootstrap_interval(value, contributions, level=rule.level, resamples=rule.resamples, seed=rule.seed)
    return low, high


def _result(
    name: str,
    length: int | None,
    seen: Seen,
    originals: ImageSet,
    protocol: Protocol,
    network: FeatureNetwork | None,
    reference: Reference | None,
) -> Result:
    title = name if length is None else f"{name}, {length} tokens"
    settings = {"quantise": protocol.images.quantise} | ({} if length is None else {"length": length})
    result = Result(title, name, len(originals), originals.size, settings)
    for metric in protocol.metrics:
        if metric == "frechet" and reference is not None and network is not None:
            fitted = reference.gaussians["features"]
            value = frechet_distance(seen.made.statistics["features"], fitted)
            low = high = None
            if "features" in seen.made.rows:
                contributions = frechet_contributions(seen.made.rows["features"], fitted, ddof=protocol.frechet.ddof)
                low, high = _interval(value, contributions, protocol)
            how = f"{len(originals):,} reconstructions against the same {len(originals):,} originals"
            title = network.titles(protocol.kind)["frechet"]
            low = None if low is None else max(low, 0.0)
            result.scores.append(Score("frechet", title, value, low, high, "lower", how))
        elif metric == "codebook" and seen.use is not None:
            use = seen.use.compute()
            if "used_share" in use:
                how = f"{use['used']} of {use['codebook']} codes in {use['tokens']:,} tokens"
                result.scores.append(Score("codebook", "codes used", use["used_share"], None, None, "higher", how))
                how = f"exp of the entropy, of {use['codebook']}"
                result.scores.append(Score("perplexity", "perplexity", use["perplexity"], None, None, "higher", how))
                keys = ("grid", "used", "used_share", "perplexity", "entropy_bits")
                result.tables["codebook by scale"] = [{k: row[k] for k in keys} for row in use["scales"]]
            for g, factor in enumerate(use.get("factors", [])):
                rows = [{k: row[k] for k in ("grid", "used", "perplexity")} for row in factor["scales"]]
                result.tables[f"codebook, factor {g}"] = rows
        elif metric in HOW:
            values = seen.per_image[metric.replace("-", "_")]
            value = float(values.mean())
            label, better, how = HOW[metric]
            if protocol.kind == "video-reconstruction":
                how = CLIPS_HOW.get(metric, how.replace("over images", "over frames and clips"))
            result.scores.append(Score(metric, label, value, *_interval(value, values, protocol), better, how))  # type: ignore[arg-type]
    shown = [to_pil(one[None].float().div(127.5).sub(1))[0] for _, one in sorted(seen.made.pictures.items())]
    result.pictures["Originals (left) and reconstructions (right)"] = grid(
        shown, 8 if protocol.kind == "reconstruction" else 2
    )
    return result
