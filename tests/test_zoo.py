"""The models that ship: small, complete, and as good as their cards say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from varkit import AutoPipeline, Rng
from varkit.data.images import ImageTransform, open_images
from varkit.metrics.classifier import ImageClassifier
from varkit.metrics.evaluate import evaluate
from varkit.metrics.reconstruction import psnr
from varkit.metrics.report import Report
from varkit.model_card import score_table
from varkit.pipelines.auto import ZOO, zoo_models

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"
FOLDER = ZOO / "fashion-var"


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> Any:
    pipe = AutoPipeline.from_pretrained("fashion-var")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", name="classifier")
def _classifier() -> ImageClassifier:
    return ImageClassifier.from_pretrained(FOLDER / "classifier").eval()


@pytest.fixture(scope="module", name="real")
def _real() -> dict[str, torch.Tensor]:
    """300 held-out images, 30 a class."""
    data = open_images(SLICE, transform=ImageTransform(32, mode="pad"))
    return data.__getitems__(list(range(300)))


def test_what_ships_is_small_and_holds_no_code() -> None:
    assert {"fashion-var", *CARDS} <= set(zoo_models())
    files = [p for p in ZOO.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 50_000_000
    assert sum(p.stat().st_size for p in files if FOLDER in p.parents) <= 14_000_000
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".png", ".webp", ".html", ".py"}
    assert [p.name for p in files if p.suffix == ".py"] in ([], ["__init__.py"])


@pytest.mark.parametrize("opener", ["varkit.AutoPipeline", "varkit.ClassToImagePipeline"])
def test_it_opens_in_a_fresh_interpreter(opener: str) -> None:
    """diffusers builds only what is imported, so whoever opens a pipeline must import its parts' modules."""
    code = f"import varkit; print({opener}.from_pretrained({str(FOLDER)!r})('Bag', seed=0).images[0].size)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "(32, 32)" in done.stdout, done.stderr


def agreement(classifier: ImageClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that the classifier puts in the class they were made for."""
    with torch.no_grad():
        return (classifier(images).argmax(1) == labels).float().mean().item()


CARDS = {
    "fashion-var": (10000, "fashion_var", ("samples", "reconstructions", "curves")),
    "fashion-llamagen": (5000, "fashion_llamagen", ("samples", "reconstructions", "curves")),
    "fashion-xar": (1000, "fashion_xar", ("samples", "reconstructions", "curves")),
    "fashion-flowar": (1000, "fashion_flowar", ("samples", "reconstructions", "curves")),
    "fashion-var-one-step": (10000, "fashion_distilled_var", ("samples", "reconstructions", "curves")),
    "fashion-flextok": (
        1000,
        "fashion_flextok_ar",
        ("samples", "reconstructions", "curves", "tokens", "tokens-samples"),
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_was_measured(name: str) -> None:
    num, recipe, pictures = CARDS[name]
    folder = ZOO / name
    card, report = (folder / "README.md").read_text(), Report.read(folder / "card" / "generation.json")
    back = Report.read(folder / "card" / "reconstruction.json")
    assert score_table(report) in card and report.fingerprint in card
    assert score_table(back) in card and back.fingerprint in card
    assert report.protocol["name"] == "fashion" and report.protocol["sampling"]["num"] == num
    assert set(report.protocol["metrics"]) <= {s.name for s in report.results[-1].scores}
    for words in ("library_name: varkit", "license:", f"`varkit train {recipe}`", "## Limits", "Machine:"):
        assert words in card
    for picture in pictures:
        assert f"card/{picture}.png" in card and Image.open(folder / "card" / f"{picture}.png").width > 300


@pytest.mark.parametrize("name", [n for n in CARDS if n != "fashion-var"])
def test_models_of_the_repository_open_by_name_and_draw_their_classes(
    name: str, classifier: ImageClassifier, real: dict[str, torch.Tensor]
) -> None:
    pipe = AutoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == pipe.image_tokenizer.dtype == torch.float32  # whatever they are stored in
    labels = [i % 10 for i in range(60)]
    images = pipe(class_labels=labels, rng=Rng.from_seed(1, 60), output_type="pt").images * 2 - 1
    recorded = Report.read(ZOO / name / "card" / "generation.json").results
    best = max(r.score("accuracy").value for r in recorded if not r.bound)
    assert agreement(classifier, images, torch.tensor(labels)) > best - 0.2
    with torch.no_grad():
        held_out = real["images"][::5]  # of all classes: they are in order
        back = pipe.image_tokenizer.decode(pipe.image_tokenizer.encode(held_out))
    scored = Report.read(ZOO / name / "card" / "reconstruction.json").results[-1]
    assert abs(psnr(back, held_out).mean().item() - scored.score("psnr").value) < 2


def test_any_number_of_flexible_tokens_is_an_image(real: dict[str, torch.Tensor]) -> None:
    """More tokens, nearer images: of the shipped tokenizer, and as its card has it."""
    tokenizer = AutoPipeline.from_pretrained("fashion-flextok").image_tokenizer
    images = real["images"][::5]
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        found = [psnr(tokenizer.decode(tokens, lengths=n), images).mean().item() for n in (1, 3, 32)]
    assert found[0] < found[-1]


def test_the_classifier_knows_held_out_garments(classifier: ImageClassifier, real: dict[str, torch.Tensor]) -> None:
    assert agreement(classifier, real["images"], real["labels"]) > 0.88


def test_the_tokenizer_gives_images_back(pipe: Any, real: dict[str, torch.Tensor]) -> None:
    tokenizer = pipe.image_tokenizer
    with torch.no_grad():
        tokens = tokenizer.encode(real["images"])
        back = tokenizer.decode(tokens)
    assert psnr(back, real["images"]).mean() > 24
    assert len(tokens.unique()) > 0.85 * tokenizer.layout.codebook_size


def test_samples_are_of_the_class_that_was_asked_for(pipe: Any, classifier: ImageClassifier) -> None:
    labels = [i % 10 for i in range(200)]
    images = pipe(class_labels=labels, rng=Rng.from_seed(1, 200), output_type="pt").images * 2 - 1
    assert agreement(classifier, images, torch.tensor(labels)) > 0.9
    assert len(images.unique(dim=0)) == 200


def test_the_picture_of_the_card_is_what_its_seed_draws(pipe: Any) -> None:
    from varkit.pictures import grid, read_settings
    from varkit.pipelines.base import generate

    path = FOLDER / "card" / "samples.png"
    seed = read_settings(path)["seed"]
    made = [image for _, _, image in generate(pipe, list(range(10)), 50, seed, 50)]
    drawn, recorded = (np.asarray(i.convert("L"), np.int16) for i in (grid(made, 10, 2), Image.open(path)))
    # Another processor may round a logit differently and flip a token: most images must still be the same.
    cells = [
        np.abs(drawn - recorded)[y : y + 66, x : x + 66].max() for y in range(0, 330, 66) for x in range(0, 660, 66)
    ]
    assert np.mean([cell < 30 for cell in cells]) > 0.8


def test_an_edit_keeps_what_was_not_redrawn(pipe: Any, real: dict[str, torch.Tensor]) -> None:
    shirts = real["images"][real["labels"] == 0][:8]
    out = pipe.edit(shirts, box=(0.5, 0, 1, 1), seed=0, output_type="pt").images * 2 - 1
    upper, lower = ((out - shirts)[:, :, rows].square().mean() for rows in (slice(0, 14), slice(18, 32)))
    assert upper < 0.5 * lower


@pytest.mark.slow
def test_scores_are_what_the_card_says() -> None:
    """Sampled again under the card's protocol, fewer images of another seed: accuracy within four standard errors."""
    recorded = Report.read(FOLDER / "card" / "generation.json")
    rows = [r for r in recorded.results if not r.bound]
    rows = [r for r in rows if "guidance_scale" in r.settings]  # not the tokenizer's own reconstructions
    scales, number = [r.settings["guidance_scale"] for r in rows], 1000
    again = evaluate(
        "fashion-var",
        SLICE,
        protocol="fashion",
        num=number,
        metrics=["accuracy"],
        overrides=["sampling.seed=9"],
        guidance=scales,
    )
    for row, result in zip(rows, again.results, strict=True):
        expected = row.score("accuracy").value
        error = 4 * (expected * (1 - expected) * (1 / number + 1 / row.num)) ** 0.5
        assert abs(result.score("accuracy").value - expected) < error
