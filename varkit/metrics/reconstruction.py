"""How well a tokenizer gives images back, and how it uses its codebook."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from varkit.layout import TokenLayout
from varkit.metrics.lpips import LPIPS, find_lpips
from varkit.metrics.structural import (
    SMALLEST_MULTI_SCALE,
    SSIM_DEFAULT,
    Range,
    check_images,
    multi_scale_ssim,
    ssim,
    to_scale,
)

logger = logging.getLogger(__name__)

JOINT_LIMIT = 2**20
"""Combinations of factorised codes up to which they are counted jointly."""


# ---- PSNR -----------------------------------------------------------------------------------------------------


def psnr(
    first: Tensor,
    second: Tensor,
    data_range: float | None = None,
    *,
    scale: Range | None = (-1.0, 1.0),
    cap: float | None = None,
    cap_below_mse: float | None = None,
) -> Tensor:
    """10 log10(data_range^2 / mean squared error) of each image, or of each whole clip; infinite where both are equal.

    Args:
        first, second: (B, C, H, W) or (B, C, T, H, W), each uint8 in [0, 255] or floats in [-1, 1].
        scale: where black and white are put before; None takes the values as they are.
        data_range: the peak; None is the width of `scale`, which makes the result the same on every scale.
        cap: value of pairs that are equal, or whose error (on `scale`) is below `cap_below_mse`.
    Returns: (B,) float64 decibels.
    Raises: ValueError for other shapes, and a missing `data_range` or `cap`.
    Source: scikit-image: skimage/metrics/simple_metrics.py (0.26.0); hywang66/LARP: eval/rfvd_evaluator.py for clips;
        JunyaoHu/common_metrics_on_video_quality (5f75173) for the cap: 100 below 1e-10, in [0, 1].
    """
    if cap is None and cap_below_mse is not None:
        raise ValueError("cap_below_mse needs the value to give there: cap")
    peak, mse = _peak(data_range, scale), _mean_squared_error(first, second, scale)
    decibels = 10 * torch.log10(peak**2 / mse)
    if cap is None:
        return decibels
    return torch.where(mse == 0 if cap_below_mse is None else mse < cap_below_mse, cap, decibels)


def psnr_set(
    first: Tensor,
    second: Tensor,
    data_range: float | None = None,
    *,
    average: Literal["psnr", "mse"] = "psnr",
    scale: Range | None = (-1.0, 1.0),
) -> float:
    """PSNR of a set: the mean over images, which is the usual rule; or (`mse`) of the mean squared error of all.

    Raises: ValueError as `psnr`, and for another average.
    """
    if average not in ("psnr", "mse"):
        raise ValueError(f"average must be psnr or mse; got {average!r}")
    if average == "psnr":
        return float(psnr(first, second, data_range, scale=scale).mean())
    mse = _mean_squared_error(first, second, scale).mean()
    return float(10 * torch.log10(_peak(data_range, scale) ** 2 / mse))


def _peak(data_range: float | None, scale: Range | None) -> float:
    if data_range is None:
        if scale is None:
            raise ValueError("values that are taken as they are (scale=None) need a data_range")
        return scale[1] - scale[0]
    return data_range


def _mean_squared_error(first: Tensor, second: Tensor, scale: Range | None) -> Tensor:
    check_images(first, second)
    return (to_scale(first, scale) - to_scale(second, scale)).square().flatten(1).mean(1)


# ---- the codebook ---------------------------------------------------------------------------------------------


class CodebookUse:
    """Counts codes scale by scale: how many are used at all, and how evenly.

    Args:
        layout: of one codebook, or of factorised codes: then each factor is counted by itself, and their combinations
            where JOINT_LIMIT allows.
        entropy_eps: inside the logarithm of `titok_entropy_bits` (bytedance/1d-tokenizer: evaluator/evaluator.py).
        perplexity_eps: inside that of `taming_perplexity` (CompVis/taming-transformers, LARP).
    Raises: ValueError for latents.
    """

    def __init__(self, layout: TokenLayout, *, entropy_eps: float = 1e-8, perplexity_eps: float = 1e-10) -> None:
        size = layout.codebook_size
        if size is None:
            raise ValueError(f"codebook use needs one codebook; got {size}")
        self.layout, self.entropy_eps, self.perplexity_eps = layout, entropy_eps, perplexity_eps
        self.sizes = (size,) if isinstance(size, int) else size
        shape, every = len(layout.grids), math.prod(self.sizes)
        self.factors = [torch.zeros(shape, k, dtype=torch.int64) for k in self.sizes if not isinstance(size, int)]
        self.joint = torch.zeros(shape, every, dtype=torch.int64) if not self.factors or every <= JOINT_LIMIT else None

    def update(self, ids: Tensor, *, first: bool = False) -> None:
        """(B, L) ids, or (B, L, G) of factorised codes.

        Args: first: fewer than L are taken too: the first ones of the layout.
        Raises: ValueError for another shape, or ids that are none.
        """
        codes = (ids if self.factors else ids[..., None]).detach().cpu()
        if codes.ndim != 3 or codes.shape[2] != len(self.sizes):
            raise ValueError(f"ids of codebook {self.layout.codebook_size} have another shape than {tuple(ids.shape)}")
        limits = torch.tensor(self.sizes)
        if ((codes < 0) | (codes >= limits)).any():
            raise ValueError(f"ids must be in 0 .. {self.sizes} - 1; got {int(codes.min())} .. {int(codes.max())}")
        parts = [codes[:, s] for s in self.layout.slices] if first else self.layout.split(codes)
        for k, part in enumerate(parts):
            for counts, column in zip(self.factors, part.flatten(0, 1).T, strict=False):
                counts[k] += torch.bincount(column, minlength=counts.shape[1])
            if self.joint is not None:
                strides = torch.tensor([math.prod(self.sizes[g + 1 :]) for g in range(len(self.sizes))])
                self.joint[k] += torch.bincount((part * strides).sum(2).flatten(), minlength=self.joint.shape[1])

    def merge(self, other: CodebookUse) -> None:
        """Add what another one counted. Raises: ValueError where the layouts differ."""
        self.layout.require(other.layout, "this count", "the other")
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            mine += theirs

    def compute(self) -> dict[str, Any]:
        """Plain data: `codebook`, `tokens`, and of all scales as of each in `scales`:

        used, used_share: distinct codes, also as a share of the codebook; they grow with `tokens`.
        perplexity, entropy_bits: exp(entropy) and entropy of the use.
        titok_entropy_bits, taming_perplexity: the same two as those evaluators compute them.

        Of factorised codes also `factors`, a list of the same; the rest only where combinations are counted.
        """
        size, tables = self.layout.codebook_size, self._tables()
        result: dict[str, Any] = {
            "codebook": size if isinstance(size, int) else list(self.sizes),
            "tokens": int(tables[0].sum()),
        }
        if self.joint is not None:
            result |= self._rows(self.joint)
        if self.factors:
            result["factors"] = [{"codebook": counts.shape[1], **self._rows(counts)} for counts in self.factors]
        return result

    def _tables(self) -> list[Tensor]:
        return [*self.factors, *([] if self.joint is None else [self.joint])]

    def _rows(self, counts: Tensor) -> dict[str, Any]:
        grids = ["x".join(map(str, grid)) for grid in self.layout.grids]
        scales = [{"grid": grid, **self._row(row)} for grid, row in zip(grids, counts, strict=True)]
        return {**self._row(counts.sum(0)), "scales": scales}

    def _row(self, counts: Tensor) -> dict[str, Any]:
        p = counts.double() / counts.sum().clamp_min(1)
        used, entropy = int((counts > 0).sum()), float(torch.special.entr(p).sum())
        return {
            "used": used,
            "used_share": used / len(counts),
            "perplexity": math.exp(entropy),
            "entropy_bits": entropy / math.log(2),
            "titok_entropy_bits": float(-(p * (p + self.entropy_eps).log2()).sum()),
            "taming_perplexity": math.exp(-float((p * (p + self.perplexity_eps).log()).sum())),
        }


# ---- a set of images ------------------------------------------------------------------------------------------


class ReconstructionMetrics:
    """PSNR, SSIM, MS-SSIM and LPIPS of each pair, in batches; two of them can be merged.

    SSIM is `SSIM_DEFAULT`, MS-SSIM `wang`; of clips these and LPIPS are means over frames. Where an image is too small
    for a measure its value is NaN, and it does not count in the mean.

    Args: lpips: networks with their weights, one for each trunk wanted (`find_lpips(..., download=False)`).
    """

    def __init__(self, lpips: Sequence[LPIPS] = ()) -> None:
        self.lpips = {f"lpips_{model.trunk}": model for model in lpips}
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._scores: dict[str, list[Tensor]] = {n: [] for n in ("psnr", "ssim", "ms_ssim", *self.lpips)}

    @torch.no_grad()
    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """(B, 3, H, W), or clips (B, 3, T, H, W); each uint8 in [0, 255] or floats in [-1, 1].

        Raises: ValueError for other shapes, and values that are not finite, naming the images.
        """
        check_images(reconstruction, original)
        for name, images in (("reconstruction", reconstruction), ("original", original)):
            bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name}: images {bad[:8]} (from 0) of this batch are not finite")
        found = {"psnr": psnr(reconstruction, original)}
        pair = [x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1) for x in (reconstruction, original)]
        smallest = {"ssim": SSIM_DEFAULT["window_size"], "ms_ssim": SMALLEST_MULTI_SCALE}
        smallest |= {name: model.smallest for name, model in self.lpips.items()}
        for name, side in smallest.items():
            if min(original.shape[-2:]) < side:
                found[name] = torch.full((len(original),), torch.nan)
            else:
                found[name] = self._measure(name, *pair).view(len(original), -1).mean(1)
        for name, scores in found.items():
            self._scores[name].append(scores.cpu().double())

    def _measure(self, name: str, reconstruction: Tensor, original: Tensor) -> Tensor:
        if name == "ssim":
            return ssim(reconstruction, original, **SSIM_DEFAULT)
        if name == "ms_ssim":
            return multi_scale_ssim(reconstruction, original)
        model = self.lpips[name]
        first, second = (to_scale(x, (-1.0, 1.0)).float().to(model.shift.device) for x in (reconstruction, original))
        return model(first, second)

    def merge(self, other: ReconstructionMetrics) -> None:
        """Append what another one saw. Raises: ValueError where it measures something else."""
        if self._scores.keys() != other._scores.keys():
            raise ValueError(f"different measures: {', '.join(self._scores)} and {', '.join(other._scores)}")
        for name, scores in other._scores.items():
            self._scores[name] += scores

    def compute(self) -> dict[str, Any]:
        """`images`, the mean of each measure, and `per_image`: each as (N,) float64, in the order seen.

        Measures that no image was large enough for are not there. Raises: ValueError without an update.
        """
        if not self._scores["psnr"]:
            raise ValueError("there are no images to average over")
        values = {name: torch.cat(scores) for name, scores in self._scores.items()}
        values = {name: scores for name, scores in values.items() if not scores.isnan().all()}
        means = {name: float(scores.nanmean()) for name, scores in values.items()}
        return {"images": len(values["psnr"]), **means, "per_image": values}

    def means(self) -> dict[str, Any]:
        """`compute` without `per_image`: plain data."""
        return {name: value for name, value in self.compute().items() if name != "per_image"}


@torch.no_grad()
def reconstruction_report(
    tokenizer: Any,
    batches: Iterable[Tensor],
    *,
    lpips: Sequence[LPIPS] = (),
    lengths: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """The means of `ReconstructionMetrics`, and `CodebookUse` where tokens are ids.

    Args:
        batches: (B, 3, H, W) in [-1, 1].   lpips: networks with their weights.
        lengths: of a tokenizer of flexible length: images -> how many tokens each is decoded from, (B,). The report
            then has them as `lengths`, in the order of the images, and only these tokens count as used.
    """
    metrics = ReconstructionMetrics(lpips)
    use = None if tokenizer.layout.codebook_size is None else CodebookUse(tokenizer.layout)
    each: list[int] = []
    for images in batches:
        tokens = tokenizer.encode(images)
        counts = None if lengths is None else lengths(images)
        if counts is not None:
            each += counts.tolist()
        if use is not None:
            for n in [tokens.shape[1]] if counts is None else counts.unique().tolist():
                use.update(tokens if counts is None else tokens[counts == n, :n], first=counts is not None)
        made = tokenizer.decode(tokens) if counts is None else tokenizer.decode(tokens, lengths=counts)
        metrics.update(made.float(), images)
    chosen = {} if lengths is None else {"lengths": each}
    return {**metrics.means(), **(use.compute() if use is not None else {}), **chosen}


def takes_lengths(tokenizer: Any) -> bool:
    """Whether it decodes any number of its first tokens: `decode(tokens, lengths=n)`."""
    return "lengths" in inspect.signature(tokenizer.decode).parameters


@torch.no_grad()
def reconstruction_curve(
    tokenizer: Any, batches: Iterable[Tensor], lengths: Sequence[int], *, lpips: Sequence[LPIPS] = ()
) -> list[dict[str, Any]]:
    """How the reconstruction grows with the tokens kept. Each batch is encoded once, and decoded at each length.

    Args:
        tokenizer: one of flexible length: `decode(tokens, lengths=n)` reads the first n.
        batches: (B, 3, H, W) in [-1, 1].   lengths: numbers of tokens, 1 .. tokenizer.layout.length.
    Returns: for each length `length` and the means of `ReconstructionMetrics`.
    Raises: ValueError for a tokenizer without `lengths`, and other lengths.
    """
    name, longest = type(tokenizer).__name__, tokenizer.layout.length
    if not takes_lengths(tokenizer):
        raise ValueError(
            f"{name} always decodes all of its {longest} tokens; a curve needs a tokenizer of flexible length, "
            "whose decode takes `lengths`"
        )
    if not lengths or not all(1 <= n <= longest for n in lengths):
        raise ValueError(f"lengths must be in 1 .. {longest}, the tokens of {name}; got {list(lengths)}")
    metrics = {n: ReconstructionMetrics(lpips) for n in lengths}
    for images in batches:
        tokens = tokenizer.encode(images)
        for n, metric in metrics.items():
            metric.update(tokenizer.decode(tokens, lengths=n).float(), images)
    return [{"length": n, **metric.means()} for n, metric in metrics.items()]


def reconstruct_folder(
    tokenizer: Any,
    source: str,
    out: Path,
    *,
    num: int,
    mode: str,
    split: str | None,
    root: str | None,
    device: str,
    tokens: int | None = None,
    target_psnr: float | None = None,
    target_lpips: float | None = None,
) -> dict[str, Any]:
    """What `varkit reconstruct` does: report, and write originals.png, reconstructions.png, metrics.json.

    LPIPS (alex) is in the report where its weights are found; nothing is downloaded.

    Args:
        tokenizer: of images, or a name that `open_tokenizer` takes.
        split: None is the test split of a named data set, and anything else itself.
        tokens: of a tokenizer of flexible length: decode the first so many of each image.
        target_psnr, target_lpips: ... or as few of 1, 2, 4, ... as reach it, image by image. One of the three at most.
    Raises: ValueError and FileNotFoundError before any work.
    """
    from varkit.data.images import DATASETS, open_images
    from varkit.data.transforms import ImageTransform
    from varkit.pictures import grid, save_png, to_pil
    from varkit.pipelines.auto import best_device, open_tokenizer

    dataset = open_images(source, split=split or ("test" if source in DATASETS else "train"), root=root)
    tokenizer = (open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer).eval()
    dataset.transform = ImageTransform(tokenizer.image_size, mode=mode, enlarge=1.0)  # type: ignore[arg-type]
    where = best_device() if device == "auto" else torch.device(device)
    tokenizer.to(where)
    lengths = _lengths(tokenizer, tokens, target_psnr, target_lpips, where)
    num = min(num, len(dataset))

    def batches(count: int) -> Iterator[Tensor]:
        for i in range(0, count, 16):
            yield dataset.__getitems__(list(range(i, min(i + 16, count))))["images"].to(where)

    report = reconstruction_report(tokenizer, batches(num), lpips=_offline_lpips(where), lengths=lengths)
    shown = torch.cat(list(batches(min(num, 64))))
    some = {} if lengths is None else {"lengths": torch.tensor(report["lengths"][: len(shown)], device=where)}
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(shown), **some)
    save_png(grid(to_pil(shown), 8), out / "originals.png")
    save_png(grid(to_pil(back), 8), out / "reconstructions.png")
    (out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _lengths(
    tokenizer: Any, tokens: int | None, target_psnr: float | None, target_lpips: float | None, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The rule by which each image gets its number of tokens; None is all. Raises: as `reconstruct_folder`."""
    given = [x for x in (tokens, target_psnr, target_lpips) if x is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError("give one of --tokens, --psnr and --lpips: each decides the number of tokens")
    name, longest = type(tokenizer).__name__, tokenizer.layout.length
    if not takes_lengths(tokenizer) or not hasattr(tokenizer, "tokens_for"):
        raise ValueError(
            f"{name} always decodes all of its {longest} tokens; --tokens, --psnr and --lpips are for tokenizers of "
            "flexible length, such as FlexTok"
        )
    if tokens is not None:
        if not 1 <= tokens <= longest:
            raise ValueError(f"--tokens must be in 1 .. {longest}, the tokens of {name}; got {tokens}")
        return lambda images: torch.full((len(images),), tokens, device=images.device)
    if target_lpips is None:
        return lambda images: tokenizer.tokens_for(images, target_psnr=target_psnr).lengths
    model = find_lpips("auto", "alex", download=False)
    assert model is not None
    height, width = tokenizer.image_size
    if min(height, width) < model.smallest:
        raise ValueError(f"LPIPS needs {model.smallest} pixels a side; images are {height}x{width}. Use --psnr")
    model.to(device)
    return lambda images: tokenizer.tokens_for(images, target_lpips=target_lpips, lpips=model).lengths


def _offline_lpips(device: torch.device) -> list[LPIPS]:
    try:
        model = find_lpips("auto", "alex", download=False)
    except FileNotFoundError as error:
        logger.info("no LPIPS: %s", error)
        return []
    return [] if model is None else [model.to(device)]
