"""The shipped models of texts and of clips: their cards say what was measured, and they do it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_clips import fashion_root  # noqa: F401 - a fixture
from varkit import AutoPipeline, Rng
from varkit.data.clips import open_clips
from varkit.metrics.classifier import ClipClassifier
from varkit.metrics.matcher import open_matcher
from varkit.metrics.report import Report
from varkit.metrics.retrieval import ranks
from varkit.model_card import score_table
from varkit.pipelines.auto import ZOO

EMOJI, CLIPS = ZOO / "emoji-llamagen", ZOO / "moving-fashion-nbp"


def facts_of(folder: Path, *words: str) -> str:
    """The card, which has these words and all of its pictures."""
    card = (folder / "README.md").read_text()
    for word in ("library_name: varkit", "license:", "## Limits", "Machine:", *words):
        assert word in " ".join(card.split())
    for picture in (folder / "card").glob("*.png"):
        assert f"card/{picture.name}" in card and Image.open(picture).width > 200
    return card


def test_the_card_of_emoji_says_what_was_measured_and_who_drew_them() -> None:
    found = json.loads((EMOJI / "card" / "generation.json").read_text())
    credits = ("Noto Emoji", "Google LLC", "Twemoji", "CC-BY 4.0", "Cal Henderson", "varkit train emoji_llamagen")
    card = facts_of(EMOJI, *credits, "pipeline_tag: text-to-image")
    assert len(found["rows"]) == 8 and {row["captions"] for row in found["rows"]} == {510}
    for row in found["rows"]:
        assert f"| {row['split']} | {row['images']} | 510 | {row['top1']:.1%}" in card
    assert score_table(Report.read(EMOJI / "card" / "reconstruction.json")) in card
    notice = (ZOO.parents[1] / "NOTICE").read_text()
    assert "varkit/zoo/emoji-llamagen" in notice and "Apache License 2.0" in notice and "CC-BY 4.0" in notice


def test_emoji_are_nearer_their_names_than_others() -> None:
    pipe, matcher = AutoPipeline.from_pretrained("emoji-llamagen"), open_matcher(EMOJI / "matcher")
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipe.text_encoder, pipe.transformer, pipe.image_tokenizer)} == {torch.float32}
    things = ["red apple", "rocket", "blue heart", "waving hand sign, dark skin tone", "cat face", "ghost", "sunflower"]
    names = [f"{vendor}: {thing}" for vendor in ("google", "twitter") for thing in things]
    images = pipe(names, rng=Rng.from_seed(0, len(names)), output_type="pt").images * 2 - 1
    with torch.no_grad():
        found = ranks(matcher.embed_images(images.float()), matcher.embed_texts(names))
    assert found.float().mean() < 0.75 * (len(names) - 1) / 2  # drawn at random they would be in the middle


@pytest.fixture(scope="module", name="clips")
def _clips() -> AutoPipeline:
    pipe = AutoPipeline.from_pretrained("moving-fashion-nbp")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_card_of_clips_says_what_was_measured() -> None:
    card = facts_of(CLIPS, "`varkit train moving_fashion_nbp`", "card/samples.webp", "ms a clip")
    report, back = (Report.read(CLIPS / "card" / f"{name}.json") for name in ("generation", "reconstruction"))
    assert report.protocol["name"] == "moving-fashion" and back.protocol["name"] == "moving-fashion-rec"
    for one in (report, back):
        assert score_table(one) in card and one.fingerprint in card
    assert {s.name for s in report.results[-1].scores} >= {"frechet", "accuracy"}
    assert getattr(Image.open(CLIPS / "card" / "samples.webp"), "n_frames", 1) == 17


def test_clips_of_a_class_are_known_as_such(clips: AutoPipeline) -> None:
    judge = ClipClassifier.from_pretrained(ZOO / "moving-fashion" / "classifier").eval()
    labels = torch.arange(60) % 30
    drawn = clips(class_labels=labels.tolist(), rng=Rng.from_seed(1, 60), output_type="pt").videos.transpose(1, 2)
    with torch.no_grad():
        agree = (judge(drawn[:, :, :16] * 2 - 1).argmax(1) == labels).float().mean().item()
    report = Report.read(CLIPS / "card" / "generation.json")
    assert agree > max(r.score("accuracy").value for r in report.results if not r.bound) - 0.2


def test_clips_go_on_from_given_frames(clips: AutoPipeline, fashion_root: Path) -> None:  # noqa: F811
    real = open_clips("moving-fashion", split="test", frames=17, size=32, root=fashion_root).__getitems__([0, 1])
    given = real["images"][:, :, :5]
    on = clips(class_labels=real["labels"].tolist(), frames=given, seed=0, output_type="pt").videos
    assert torch.allclose(on[:, :5].transpose(1, 2) * 2 - 1, given, atol=1e-5)
    error = (on[:, 5:].transpose(1, 2) * 2 - 1 - real["images"][:, :, 5:]).abs().mean()
    apart = (on[:, 5:].flip(0).transpose(1, 2) * 2 - 1 - real["images"][:, :, 5:]).abs().mean()
    assert error < apart  # nearer its own clip than the other one
