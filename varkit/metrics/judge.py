"""Judging a class-conditional generator by a classifier of the same data, beside what bounds it.

Every distance is FD(classifier): the Frechet distance of the classifier's features, N images against the whole
training set. Three kinds of images share that N and that reference, so their numbers compare: held-out real
images (the floor), the tokenizer's reconstructions of them (what a perfect generator could reach), and samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from varkit.data.images import ImageDataset
from varkit.metrics.classifier import Agreement, ImageClassifier
from varkit.metrics.fid import FeatureStatistics, frechet_distance
from varkit.metrics.reconstruction import CodebookUse, psnr
from varkit.rng import Rng

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) in [-1, 1] and their labels (B,)."""


def batches(data: ImageDataset, num: int, size: int = 256) -> Iterable[Batch]:
    """The first `num` images of a data set."""
    for first in range(0, min(num, len(data)), size):
        batch = data.__getitems__(list(range(first, min(first + size, num, len(data)))))
        yield batch["images"], batch["labels"]


@torch.no_grad()
def statistics(classifier: ImageClassifier, images: Iterable[Batch]) -> tuple[FeatureStatistics, Agreement]:
    """Features of a set, and how far the classifier agrees with its labels."""
    features, agreement = FeatureStatistics(classifier.head.in_features), Agreement(classifier)
    for x, labels in images:
        features.update(classifier.features(x))
        agreement.update(x, labels)
    return features, agreement


def sampled(pipeline: Any, num: int, seed: int, size: int = 125, **settings: Any) -> Iterable[Batch]:
    """`num` samples, classes cycled; rounded to 8 bits, as a file would hold them."""
    classes = pipeline.transformer.num_classes
    for first in range(0, num, size):
        labels = [i % classes for i in range(first, min(first + size, num))]
        rng = Rng.from_seed(seed, len(labels), first)
        images = pipeline(class_labels=labels, rng=rng, output_type="pt", **settings).images
        yield images.mul(255).round().div(127.5).sub(1), torch.tensor(labels)


@torch.no_grad()
def judge(
    pipeline: Any,
    classifier: ImageClassifier,
    train: ImageDataset,
    test: ImageDataset,
    *,
    num: int,
    guidances: Sequence[float],
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """The table of a model card.

    Args:
        num: images of each kind; at most the size of `test`.
        guidances: guidance scales to sample at.   settings: further sampler settings.
    Returns: plain data: `protocol`, `num`, `guidances`, `floor`, `reconstruction` and a `samples` list of rows with
        `fd`, `agreement`, ...
    """
    num = min(num, len(test))
    reference, _ = statistics(classifier, batches(train, len(train)))
    real, accuracy = statistics(classifier, batches(test, num))
    tokenizer = pipeline.image_tokenizer
    use, decibels = CodebookUse(tokenizer.layout), []
    pairs: list[Batch] = []
    for x, labels in batches(test, num):
        ids = tokenizer.encode(x)
        use.update(ids)
        pairs.append((tokenizer.decode(ids).float(), labels))
        decibels.append(psnr(pairs[-1][0], x))
    back, back_agreement = statistics(classifier, pairs)
    floor, limit = frechet_distance(real, reference), frechet_distance(back, reference)
    rows = []
    for w in guidances:
        began = time.perf_counter()
        made, agreement = statistics(classifier, sampled(pipeline, num, seed, guidance_scale=w, **settings))
        result, fd = agreement.compute(), frechet_distance(made, reference)
        rows.append(
            {
                "guidance_scale": w,
                "agreement": float(result["agreement"]),
                "agreement_per_class": [round(float(v), 4) for v in result["per_class"]],
                "fd": fd,
                "times_reconstruction": fd / limit,
                "seconds_per_image": (time.perf_counter() - began) / num,
            }
        )
    return {
        "protocol": f"FD(classifier): features of the shipped classifier, {num} images against {len(train)} "
        f"training images; samples: seed {seed}, classes cycled, 8-bit; {pipeline.sampler.settings(**settings)}",
        "num": num,
        "guidances": ",".join(f"{w:g}" for w in guidances),
        "floor": {"fd": floor, "accuracy": float(accuracy.compute()["agreement"])},
        "reconstruction": {
            "fd": limit,
            "agreement": float(back_agreement.compute()["agreement"]),
            "psnr": float(torch.cat(decibels).mean()),
            "codebook": use.compute(),
        },
        "samples": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    floor, back = result["floor"], result["reconstruction"]
    lines = [
        "| images | class agreement | FD(classifier) | times reconstruction |",
        "|---|---|---|---|",
        f"| held-out real images (floor) | {floor['accuracy']:.1%} | {floor['fd']:.3f} "
        f"| {floor['fd'] / back['fd']:.2f} |",
        f"| their reconstructions | {back['agreement']:.1%} | {back['fd']:.3f} | 1 |",
    ]
    for row in result["samples"]:
        lines.append(
            f"| samples, guidance {row['guidance_scale']:g} | {row['agreement']:.1%} | {row['fd']:.3f} "
            f"| {row['times_reconstruction']:.2f} |"
        )
    lines += ["", "| scale | codes used | perplexity |", "|---|---|---|"]
    use = back["codebook"]
    lines += [f"| {s['grid']} | {s['used']} | {s['perplexity']:.1f} |" for s in use["scales"]]
    lines.append(f"| all | {use['used']} of {use['codebook']} ({use['used_share']:.1%}) | {use['perplexity']:.1f} |")
    return "\n".join(lines)
