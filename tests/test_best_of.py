"""Best of n: several candidates of each image, of which a classifier chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import liven
from varkit import Rng
from varkit.cli import app
from varkit.metrics.classifier import ImageClassifier
from varkit.metrics.protocol import load_protocol
from varkit.metrics.sources import open_generated
from varkit.pictures import read_settings
from varkit.pipelines.auto import assemble
from varkit.pipelines.best_of import find_classifier
from varkit.registry import model_entry

LABELS = [0, 2, 1, 1, 0]


def tiny(name: str) -> Any:
    entry = model_entry(name)
    torch.manual_seed(0)
    tokenizer: Any = model_entry(str(entry.tokenizer)).build(**entry.tiny_tokenizer)
    settings = {"guidance_scale": 2.0}
    model: Any = liven(entry.build(**entry.tiny))
    if model.layout.codebook_size is None:
        settings |= {"head_steps": 3}
    pipe = assemble(model, liven(tokenizer, 0.05), settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judge_of(pipe: Any, classes: int = 3) -> Any:
    torch.manual_seed(2)
    return liven(ImageClassifier(classes, pipe.image_tokenizer.image_size[0], (8, 16)), 0.3)


@pytest.fixture(scope="module", params=["var_fashion", "flowar_s", "flextok_ar_fashion"], name="pipe")
def _pipe(request: pytest.FixtureRequest) -> Any:
    """Ids; latents; ids whose decoder starts from noise."""
    return tiny(request.param)


@pytest.fixture(scope="module", name="var")
def _var() -> Any:
    return tiny("var_fashion")


@pytest.fixture(scope="module", name="folder")
def _folder(var: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    var.save_pretrained(folder)
    judge_of(var).save_pretrained(folder / "classifier")
    return folder


def rng() -> Rng:
    return Rng.from_seed(7, len(LABELS))


def asked(judge: Any, images: Tensor, labels: list[int]) -> Tensor:
    with torch.no_grad():
        return judge(images.clamp(0, 1) * 2 - 1).softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)]


def test_candidates_have_numbers_of_their_own() -> None:
    three = Rng.from_seed(0, 3)
    assert three.candidate(0) is three
    seeds = torch.cat([three.candidate(i).seeds for i in range(5)])
    assert len(seeds.unique()) == 15
    assert torch.equal(three.candidate(2)[1:2].seeds, Rng.from_seed(0, 1, first=1).candidate(2).seeds)


def test_the_likeliest_candidate_is_kept(pipe: Any) -> None:
    judge = judge_of(pipe)
    plain = pipe(LABELS, rng=rng(), output_type="pt").images
    out = pipe(LABELS, rng=rng(), output_type="pt", best_of=4, classifier=judge)
    scores = torch.tensor(out.scores)
    assert scores.shape == (5, 4) and out.chosen == scores.argmax(1).tolist() and len(set(out.chosen)) > 1
    assert out.stats["candidates"] == 20 and out.class_labels == LABELS
    torch.testing.assert_close(asked(judge, plain, LABELS), scores[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(asked(judge, out.images, LABELS), scores.max(1).values, rtol=0, atol=1e-5)
    tokens = pipe(LABELS, rng=rng(), output_type="latent", best_of=4, classifier=judge).images
    for row, number in enumerate(out.chosen):
        if number == 0:  # the image that is drawn without
            torch.testing.assert_close(out.images[row], plain[row], rtol=0, atol=1e-5)
        alone = pipe(LABELS, rng=rng().candidate(number), output_type="latent").images
        torch.testing.assert_close(tokens[row], alone[row])
    decoded = pipe.to_images(tokens, "pt", rng())  # from the image's own noise, as sets for evaluation are
    torch.testing.assert_close(decoded, out.images, rtol=0, atol=1e-4)
    one = pipe(LABELS, rng=rng(), output_type="pt", best_of=1, classifier=judge)
    assert torch.equal(one.images, plain) and one.chosen == [0] * 5
    assert one.scores == [[s] for s in pipe(LABELS, rng=rng(), best_of=2, classifier=judge).scores for s in s[:1]]


def test_an_image_does_not_depend_on_its_batch_and_a_batch_is_never_larger(
    var: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, sizes = judge_of(var), []
    start = type(var.transformer).start

    def watched(self: Any, cond: Any, null: Any = None) -> Any:
        sizes.append(len(cond))
        return start(self, cond, null)

    monkeypatch.setattr(type(var.transformer), "start", watched)
    out = var(LABELS, rng=rng(), output_type="pt", best_of=4, classifier=judge, accept=0.4)
    assert max(sizes) == len(LABELS)
    for i, label in enumerate(LABELS):
        alone = var([label], rng=rng()[i : i + 1], output_type="pt", best_of=4, classifier=judge, accept=0.4)
        assert alone.chosen == out.chosen[i : i + 1] and len(alone.scores[0]) == len(out.scores[i])
        torch.testing.assert_close(alone.images[0], out.images[i], rtol=0, atol=1e-5)


def test_a_probability_that_is_enough_ends_the_drawing(var: Any) -> None:
    judge = judge_of(var)
    every = var(LABELS, rng=rng(), best_of=5, classifier=judge).scores
    enough = sorted(s for row in every for s in row)[15]
    out = var(LABELS, rng=rng(), best_of=5, classifier=judge, accept=enough)
    ended = 0
    for row, all_of_it, number in zip(out.scores, every, out.chosen, strict=True):
        assert row == pytest.approx(all_of_it[: len(row)], abs=1e-5)
        assert all(s < enough for s in row[:-1]) and number == max(range(len(row)), key=row.__getitem__)
        assert row[-1] >= enough or len(row) == 5
        ended += len(row) < 5
    assert ended > 0 and out.stats["candidates"] == sum(len(row) for row in out.scores) < 25


def test_an_edit_keeps_what_it_keeps(var: Any) -> None:
    image = var([1], seed=0).images[0]
    out = var.edit(image, box=(0, 0, 1, 0.5), class_labels=[2], seed=1, best_of=3, classifier=judge_of(var))
    assert len(out.scores[0]) == 3 and out.images[0].size == image.size
    with pytest.raises(ValueError, match="3 stands for none: give a class"):
        var.edit(image, box=(0, 0, 1, 0.5), seed=1, best_of=3, classifier=judge_of(var))


def test_refusals(var: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_of(var)
    monkeypatch.setattr(type(var.transformer), "start", lambda *_: pytest.fail("work began"))
    large = ImageClassifier(3, 16, (8,))
    for settings, message in (
        ({"best_of": 2}, "best_of and accept need a classifier"),
        ({"accept": 0.5}, "best_of and accept need a classifier"),
        ({"best_of": 0, "classifier": judge}, "best_of must be a whole number from 1"),
        ({"best_of": 2, "classifier": judge, "accept": 0.0}, "accept must be a probability"),
        ({"best_of": 2, "classifier": judge, "accept": 50}, "accept must be a probability"),
        ({"best_of": 2, "classifier": judge_of(var, 4)}, "knows 4 classes, but the model draws 3"),
        ({"best_of": 2, "classifier": large}, "takes images of 16x16, but the model draws 8x8"),
        ({"best_of": 2, "classifier": folder / "transformer"}, "holds a VAR, not a classifier"),
        ({"best_of": 2, "classifier": judge, "class_labels": [0, 3]}, "3 stands for none"),
    ):
        with pytest.raises(ValueError, match=message):
            var(**{"class_labels": [0], **settings})
    with pytest.raises(FileNotFoundError, match="no classifier in"):
        var([0], best_of=2, classifier=tmp_path)
    assert find_classifier("fashion-var") == find_classifier("fashion-var/classifier")
    assert find_classifier(folder) == folder / "classifier" == find_classifier(folder / "classifier")


def test_the_command_tells_the_scores(folder: Path, tmp_path: Path) -> None:
    def run(*words: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["sample", str(folder), *[str(w) for w in words]])
        assert result.exit_code == code, result.output
        return result

    options = ["--class", "0,1", "--num", 4, "--best-of", 3, "--classifier", folder, "--accept", 0.9]
    told = [
        json.loads(run(*options, "--batch-size", size, "--out", tmp_path / str(size), "--json").stdout)
        for size in (4, 3)
    ]
    assert told[0]["chosen"] == told[1]["chosen"] and len(told[0]["scores"]) == 4
    assert told[0]["settings"]["best_of"] == 3 and told[0]["settings"]["classifier"] == str(folder)
    carried = read_settings(tmp_path / "3" / "000002.png")
    assert (carried["best_of"], carried["accept"], carried["chosen"]) == (3, 0.9, told[0]["chosen"][2])
    assert carried["scores"] == pytest.approx(told[0]["scores"][2], abs=1e-5)
    text = run(*options, "--out", tmp_path / "a.png")
    assert "best of 3 by" in text.stderr and "mean probability of the class" in text.stdout
    assert read_settings(tmp_path / "a.png")["scores"][1] == pytest.approx(told[0]["scores"][1], abs=1e-5)
    assert "best_of" not in json.loads(run("--num", 1, "--out", tmp_path / "b.png", "--json").stdout)["settings"]
    for words, message in (
        (["--best-of", 2], "need --classifier"),
        (["--accept", 0.5], "need --classifier"),
        (["--best-of", 2, "--classifier", "fashion-var"], "knows 10 classes, but the model draws 3"),
        (["--best-of", 2, "--classifier", tmp_path], "no classifier in"),
        (["--best-of", 2, "--classifier", folder, "--class", "3"], "3 stands for none"),
    ):
        stderr = run(*words, "--out", tmp_path / "c.png", code=2).stderr
        assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


def test_an_evaluated_row_names_it(var: Any, folder: Path) -> None:
    rules = load_protocol("fashion", ["sampling.num=6"])
    sampling = {"best_of": 2, "classifier": folder}
    (plain,) = open_generated(var, rules, torch.device("cpu"), sampling={})
    (chosen,) = open_generated(var, rules, torch.device("cpu"), sampling=sampling)
    assert chosen.name == f"{plain.name}, best of 2 by {folder}" and "best_of" not in plain.settings
    assert chosen.settings["best_of"] == 2 and chosen.settings["classifier"] == str(folder)
    judge = ImageClassifier.from_pretrained(folder / "classifier").eval()
    images = [one.read(range(6)).float() / 255 for one in (plain, chosen)]
    before, after = (asked(judge, x, plain.labels.tolist()) for x in images)  # type: ignore[union-attr]
    assert (after >= before - 1e-3).all() and (after > before + 1e-3).any()
    with pytest.raises(ValueError, match="need a classifier"):
        open_generated(var, rules, torch.device("cpu"), sampling={"best_of": 2})
