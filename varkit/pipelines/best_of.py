"""Best of n: of several candidates for an image, the one whose class a classifier is surest of.

    pipe(["Bag"], best_of=4, classifier="fashion-var")

Razavi et al. (VQ-VAE-2, arXiv 1906.00446) reject samples by a classifier so; it trades diversity for agreement with the
class. Here the number of candidates is what is chosen and, with `accept`, a probability that is enough.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkit.metrics.classifier import ImageClassifier
from varkit.pipelines.auto import ZOO
from varkit.rng import Rng

NAMES = ("best_of", "classifier", "accept")
"""The arguments of a pipeline call that this is about."""


def find_classifier(name: str | Path, wanted: str = ImageClassifier.__name__) -> Path:
    """The folder of a classifier: its own, or that of the shipped or saved model it lies in.

    Args: wanted: its class.

    Raises: FileNotFoundError when there is none; ValueError when the folder holds another network.
    """
    places = (Path(name), Path(name) / "classifier", ZOO / name, ZOO / name / "classifier")
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no classifier in {name}: expected a folder that `varkit train` wrote (config.json), or fashion-var"
        )
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if kind != wanted:
        what = "images" if wanted == ImageClassifier.__name__ else "clips"
        raise ValueError(f"{folder} holds a {kind}, not a classifier of {what} ({wanted})")
    return folder


def open_judge(classifier: str | Path | nn.Module) -> Any:
    """A classifier by name or folder, or one that is open, ready to be asked. Raises: as `find_classifier`."""
    if isinstance(classifier, nn.Module):
        return classifier.eval()
    return ImageClassifier.from_pretrained(find_classifier(classifier)).eval()


def judge_name(classifier: Any) -> str:
    """What records call it."""
    return type(classifier).__name__ if isinstance(classifier, nn.Module) else str(classifier)


@dataclass
class Choice:
    """Of each image the probability of its class, for every candidate in turn; which of them is kept; what it took."""

    scores: list[list[float]]
    chosen: list[int]
    stats: dict[str, Any]


class BestOf:
    """How many candidates, and who chooses.

    Args:
        pipeline: class labels -> images.
        best_of: candidates of each image at most.
        classifier: a folder, the name of a model that has one, or an open `ImageClassifier` of the same classes in the
            same order.
        accept: a probability of the class that is enough: the first candidate that has it is kept, and none is drawn
            after it. None draws all.
    Raises: ValueError on a bad argument, or a classifier of other classes or sizes; as `find_classifier`.
    """

    def __init__(
        self, pipeline: Any, best_of: int, classifier: str | Path | nn.Module | None, accept: float | None = None
    ) -> None:
        if type(best_of) is not int or best_of < 1:
            raise ValueError(f"best_of must be a whole number from 1 (one candidate an image); got {best_of!r}")
        if classifier is None:
            raise ValueError("best_of and accept need a classifier that chooses (classifier=), such as fashion-var")
        if accept is not None and not 0 < accept <= 1:
            raise ValueError(f"accept must be a probability in (0, 1], such as 0.5; got {accept}")
        self.num, self.accept, self.judge = best_of, accept, open_judge(classifier)
        side, classes = self.judge.config.image_size, self.judge.config.num_classes
        size, wanted = tuple(pipeline.image_tokenizer.image_size), pipeline.transformer.num_classes
        if classes != wanted:
            raise ValueError(
                f"the classifier {judge_name(classifier)} knows {classes} classes, but the model draws {wanted}: "
                f"choose one that was trained on the model's classes"
            )
        if size != (side, side):
            raise ValueError(
                f"the classifier {judge_name(classifier)} takes images of {side}x{side}, but the model draws "
                f"{size[0]}x{size[1]}: choose one that was trained at that size"
            )
        self.null = wanted

    def check_labels(self, labels: Sequence[int]) -> None:
        """Raises ValueError where an image has no class."""
        if self.null in labels:
            raise ValueError(f"best_of compares images with their class, and {self.null} stands for none: give a class")

    @torch.no_grad()
    def probability(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] and their classes (B,) -> what the classifier gives the classes, (B,) float32."""
        self.judge.to(images.device)
        weight = next(self.judge.parameters())
        logits = self.judge(images.clamp(0, 1).mul(2).sub(1).to(weight.dtype)).float()
        return logits.softmax(-1).gather(1, labels[:, None])[:, 0]

    def draw(
        self,
        one: Callable[[Tensor, Rng], tuple[Tensor, dict[str, Any]]],
        decode: Callable[[Tensor, Rng], Tensor],
        labels: Tensor,
        rng: Rng,
        latent: bool = False,
    ) -> tuple[Tensor, Choice]:
        """The kept images (B, 3, H, W) in [0, 1], or their tokens. A candidate of every image at a time.

        Candidate 0 is the image that is drawn without all this, and each is decoded from the image's own noise.

        Args:
            one: rows (b,) of the batch and their random numbers -> tokens of these images, and what they took.
            decode: tokens and the images' own random numbers -> images in [0, 1].
            labels: (B,).   latent: give tokens.
        """
        left = torch.arange(len(labels), device=labels.device)
        best = torch.full((len(labels),), -1.0, device=labels.device)
        chosen = torch.zeros_like(labels)
        scores: list[list[float]] = [[] for _ in range(len(labels))]
        kept, taken = torch.empty(0), Counter[str]()
        for number in range(self.num):
            tokens, counts = one(left, rng.candidate(number)[left])
            images = decode(tokens, rng[left])
            found = self.probability(images, labels[left])
            for row, value in zip(left.tolist(), found.tolist(), strict=True):
                scores[row].append(value)
            new = tokens if latent else images
            if number == 0:
                kept = new.clone()
            better = found > best[left]
            rows = left[better]
            kept[rows], best[rows], chosen[rows] = new[better], found[better], number
            taken.update({**counts, "candidates": len(left)})
            if self.accept is not None:
                left = left[~(found >= self.accept)]
            if not len(left):
                break
        return kept, Choice(scores, chosen.tolist(), dict(taken))
