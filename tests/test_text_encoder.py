"""A text encoder of bytes that learns along with its generator, and the matcher that judges what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.test_text_training import captioned
from tests.test_training import recipe
from varkit import AutoPipeline, Rng, registry
from varkit.cli import app
from varkit.conditioning.text import TextCondition, byte_encoder, pooled
from varkit.config import ConfigError
from varkit.eight_bit import pack_tensors, unpack_tensors
from varkit.metrics.matcher import ImageTextMatcher, open_matcher
from varkit.metrics.retrieval import ranks, row
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config

transformers = pytest.importorskip("transformers", reason="the extra text is not installed")

TEXTS = ["a red cat", "手紙", "", "dog", "письмо: кот", "the mat", "a cat", "no"]
SIZES = {"width": 16, "depth": 1, "heads": 2, "length": 12, "pool": 3, "dropout": 0.0}


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    entry = registry.model_entry("llamagen_t2i_small_64")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    registry.create_model(entry.tokenizer, **entry.tiny_tokenizer).save_pretrained(folder)
    return str(folder)


def plan(tokenizer: str, **changes: Any) -> dict[str, Any]:
    sizes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "ffn_dropout": 0.0, "token_dropout": 0.0, "dropout": 0.0}
    chosen = {"name": "next-token", "model": "llamagen_t2i_small_64", "tokenizer": tokenizer, "text_encoder": SIZES}
    return {**chosen, "model_overrides": sizes, "sampling": {"guidance_scale": 2.0}, **changes}


def objective(tokenizer: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(objective_config(plan(tokenizer, **changes)), [])


# ---- the encoder ----------------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_of_real_neighbours() -> None:
    states = torch.arange(14.0).view(1, 7, 2)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    means, real = pooled(states, mask, 3)
    assert real.tolist() == [[1, 1, 0]]
    assert torch.equal(means[0], torch.stack([states[0, :3].mean(0), states[0, 3], torch.zeros(2)]))
    assert pooled(states, mask, 1)[0] is states


def test_any_script_is_read_and_what_is_too_long_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder, tokenizer = byte_encoder(16, 1, 2, pool=3)
    condition = TextCondition(encoder.eval(), tokenizer, max_length=4, clean=False)
    assert condition.lengths(["ab", "abc", "手紙", "x" * 30]) == [1, 2, 3, 11]  # bytes and the end, by threes
    sequence, mask = condition.encode(prompt=["ab", "手紙", "письмо " * 9]).text
    assert sequence.shape == (3, 4, 16) and mask.sum(1).tolist() == [1, 3, 4] and not sequence[~mask].any()
    assert "has 39 tokens; 4 are read" in caplog.text
    other = condition.encode(prompt=["ab", "手紐"]).text[0]
    assert torch.allclose(other[0], sequence[0], atol=1e-5) and not torch.allclose(other[1], sequence[1], atol=1e-3)
    with pytest.raises(ValueError, match="prompt 1: it is empty"):
        condition.encode(prompt=["a", "  "])
    longest, real = condition.states(["ab", "手紙"], "longest")
    assert torch.allclose(longest[1], sequence[1, 1:], atol=1e-5) and real.sum(1).tolist() == [1, 3]


def test_gradients_reach_the_encoder_and_captions_without_text_stay_null(tokenizer: str) -> None:
    trained = objective(tokenizer, model_overrides=plan(tokenizer)["model_overrides"] | {"cond_drop_rate": 0.0})
    trained.check_texts("data.train", TEXTS)
    trained.model.output.weight.data.normal_()
    assert trained.model.config.text_length == 4 and trained.model.config.text_dim == 16 and not trained.shards
    batch = {"images": torch.rand(8, 3, *trained.image_size) * 2 - 1, "labels": torch.full((8,), -1), "texts": TEXTS}
    trained.train()
    trained(batch, "main", 0, 10, Rng.from_seed(0, 8))["loss"].backward()
    weights = list(trained.trained("main").parameters())
    own = list(trained.text_encoder.parameters())
    assert {id(w) for w in own} <= {id(w) for w in weights}
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in own if w.dim() > 1)
    sequence, mask = trained.cond(batch).text
    assert torch.equal(sequence[2], trained.model.cls_embedding.uncond_embedding) and mask[2].all()
    assert sequence[0].requires_grad and not torch.equal(sequence[0], sequence[3])
    trained.eval()
    assert not trained.cond(batch).text[0].requires_grad  # nothing is kept for a backward pass when it is not trained


def test_a_run_resumes_exactly_and_exports_what_opens_without_a_network(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = captioned(tmp_path / "images", TEXTS)
    changes = [f"data.train={images}", f"data.validation={images}", "loop.steps=4", "loop.validate_every=2"]
    changes += ["loop.sample_every=4", "loop.save_every=2", "data.flip=false", "data.mode=shift", "loop.ema_decay=0.5"]
    whole = train(recipe(tmp_path / "whole", plan(tokenizer), *changes))
    again = recipe(tmp_path / "again", plan(tokenizer), *changes)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (whole.folder / "checkpoints" / "step-00000002").rename(tmp_path / "again" / "checkpoints" / "step-00000002")
    resumed = train(again, resume=True)
    parts = ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    for part in parts:
        assert (whole.folder / "model" / part).read_bytes() == (resumed.folder / "model" / part).read_bytes()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = AutoPipeline.from_pretrained(resumed.folder / "model")
    first = byte_encoder(16, 1, 2, pool=3)[0].config
    assert pipeline.text_encoder.config.pool == first.pool == 3 and not pipeline.config.clean_prompts
    words = ["sample", str(resumed.folder / "model"), "--prompt", "手紙", "--prompt", "a red cat", "--num", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "grid.png")])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "grid.png").size[0] > 0
    nothing = CliRunner().invoke(app, ["sample", str(resumed.folder / "model"), "--prompt", " ", "--num", "1"])
    assert nothing.exit_code == 2 and "prompt 0: it is empty" in nothing.output
    moved = resumed.folder.rename(tmp_path / "moved") / "model"
    assert pipeline(["dog"], seed=0, output_type="latent").images.tolist() == (
        AutoPipeline.from_pretrained(moved)(["dog"], seed=0, output_type="latent").images.tolist()
    )


def test_the_encoder_learns_with_the_generator(tokenizer: str, tmp_path: Path) -> None:
    images = captioned(tmp_path / "images", ["one", "two", "six", "ten"])
    changes = [f"data.train={images}", f"data.validation={images}", "loop.steps=120", "loop.validate_every=120"]
    changes += ["loop.sample_every=0", "loop.save_every=0", "data.flip=false", "optim.lr=2e-2", "loop.log_every=120"]
    own = {"model_overrides": plan(tokenizer)["model_overrides"] | {"cond_drop_rate": 0.0}}
    run = train(recipe(tmp_path / "run", plan(tokenizer, **own), *changes))
    pipeline = AutoPipeline.from_pretrained(run.folder / "model")
    settings: dict[str, Any] = {"output_type": "latent", "seed": 0, "guidance_scale": 1.0, "temperature": 0.01}
    drawn = pipeline(["one", "two", "six", "ten"], **settings).images
    assert len({tuple(ids) for ids in drawn.tolist()}) == 4  # the words are told apart


def test_what_does_not_go_together_is_refused(tokenizer: str) -> None:
    for changes, message in (
        ({"text_encoder": SIZES | {"heads": 3}}, "objective.text_encoder.width 16 must be a multiple of heads 3"),
        ({"text_encoder": SIZES | {"length": 10}}, "objective.text_encoder.length 10 must be a multiple of pool 3"),
        ({"text_encoder": SIZES | {"depth": 0}}, "objective.text_encoder.depth must be at least 1"),
        ({"features": "somewhere"}, "objective.features and objective.text_encoder both"),
        ({"init_from": "somewhere"}, "is a new encoder, which the generator of objective.init_from"),
        ({"model": "llamagen_fashion"}, "objective.text_encoder is for generators of texts"),
    ):
        with pytest.raises(ConfigError, match=message):
            objective(tokenizer, **changes)


# ---- the matcher ----------------------------------------------------------------------------------------------------

MATCHER = {"image_size": 8, "widths": [8, 8], "text_width": 16, "text_depth": 1, "text_heads": 2, "dim": 8}


def test_ranks_count_what_is_as_near_and_ties_count_against() -> None:
    images = torch.eye(3)
    assert ranks(images, torch.eye(3)).tolist() == [0, 0, 0]
    assert ranks(images, torch.eye(3)[[1, 2, 0]]).tolist() == [2, 2, 2]  # own at 0, as is one other, one above
    assert ranks(images, torch.ones(3, 3)).tolist() == [2, 2, 2]
    scores = row("test", "real", torch.tensor([0, 4, 5, 9]))
    assert (scores.top1, scores.top5, scores.captions) == (0.25, 0.5, 4)
    assert scores.top1_interval is not None and scores.top1_interval[0] <= 0.25 <= scores.top1_interval[1]
    with pytest.raises(ValueError, match="as many texts as images"):
        ranks(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.full((2, 2), torch.nan), torch.zeros(2, 2))


def test_an_embedding_is_a_unit_vector_whatever_the_batch() -> None:
    torch.manual_seed(0)
    matcher = ImageTextMatcher(**MATCHER).eval()
    texts = ["", "手", "a text that is long " * 20, "ab"]
    together = matcher.embed_texts(texts)
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        assert torch.allclose(matcher.embed_texts([text])[0], vector, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes \(B, 3, 8, 8\)"):
        matcher.embed_images(torch.zeros(1, 3, 9, 9))


def test_a_trained_matcher_finds_real_images_and_the_command_reports(tokenizer: str, tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    captioned(tmp_path / "set" / "train", words)
    captioned(tmp_path / "set" / "test", words[:4])
    side = objective(tokenizer).image_size[0]
    changes = [f"data.train={tmp_path / 'set'}", f"data.validation={tmp_path / 'set'}", "data.validation_split=test"]
    changes += ["loop.steps=60", "loop.validate_every=60", "loop.sample_every=0", "loop.save_every=0"]
    changes += ["data.flip=false", "optim.lr=1e-2", "loop.ema_decay=0"]
    chosen = {"name": "matcher", **MATCHER, "image_size": side, "dropout": 0.0}
    run = train(recipe(tmp_path / "run", chosen, *changes))
    assert isinstance(open_matcher(run.folder / "model"), ImageTextMatcher)
    objective(tokenizer).export(tmp_path / "model")
    command = ["retrieval", str(tmp_path / "model"), str(tmp_path / "set"), "--matcher", str(run.folder / "model")]
    done = CliRunner().invoke(app, [*command, "--num", "8", "--json", "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    rows = {(r["split"], r["images"]): r for r in json.loads(done.stdout)["rows"]}
    assert set(rows) == {(s, k) for s in ("train", "test") for k in ("generated", "reconstructed", "real", "chance")}
    assert rows["train", "real"]["top1"] == 1 and rows["train", "chance"]["top1"] == 1 / 8
    assert rows["test", "chance"]["top5"] == 1 and rows["test", "real"]["captions"] == 4
    parts = CliRunner().invoke(app, [*command, "--num", "8", "--json", "--batch-size", "8"])
    assert json.loads(parts.stdout)["rows"] == list(rows.values())  # the batch changes nothing
    for words_, message in (
        ([*command[:3], "--matcher", str(tmp_path)], "no matcher in"),
        ([*command, "--guidance", "0.5", "--split", "val", "--num", "1"], "--num"),
    ):
        assert message in CliRunner().invoke(app, words_).output
    silent = captioned(tmp_path / "silent", ["", "a"])
    with pytest.raises(ConfigError, match="1 of 2 images have no caption"):
        train(recipe(tmp_path / "never", chosen, f"data.train={silent}", "data.validation=null"))


def test_a_model_of_texts_is_packed_with_its_matcher_and_has_a_card(tokenizer: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the curves")
    from varkit.training.card import load_text, pack_model, write_card

    words = ["one", "two", "three", "four"]
    captioned(tmp_path / "set" / "train", words)
    captioned(tmp_path / "set" / "test", words)
    changes = [f"data.train={tmp_path / 'set'}", f"data.validation={tmp_path / 'set'}", "data.flip=false"]
    changes += ["data.validation_split=test", "loop.steps=2", "loop.validate_every=2", "loop.save_every=0"]
    drawer = train(recipe(tmp_path / "drawer", plan(tokenizer), *changes, "loop.sample_every=0"))
    chosen = {"name": "matcher", **MATCHER, "image_size": objective(tokenizer).image_size[0]}
    judge = train(recipe(tmp_path / "judge", chosen, *changes, "loop.sample_every=0"))
    values = {
        "name": "tiny-text",
        "runs": {"transformer": {"folder": str(drawer.folder)}},
        "matcher": str(judge.folder / "model"),
        "prompts": ["one", "手紙"],
        "dtype": "int8",
        "curves": [["transformer", "loss"]],
        "data": str(tmp_path / "set"),
        "mode": "squash",
        "limits": "- A limit.",
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    text, ship = load_text(tmp_path / "card.yaml"), tmp_path / "ship"
    pack_model(text, ship)
    opened = AutoPipeline.from_pretrained(ship)
    assert {part.dtype for part in (opened.text_encoder, opened.transformer, opened.image_tokenizer)} == {torch.float32}
    packed = open_matcher(ship / "matcher").state_dict()
    assert all(torch.equal(v, packed[k]) for k, v in unpack_tensors(pack_tensors(_weights(judge.folder))).items())
    command = CliRunner().invoke(app, ["retrieval", str(ship), str(tmp_path / "set"), "--num", "4", "--json"])
    assert command.exit_code == 0, command.output
    (tmp_path / "found.json").write_text(command.stdout)
    back = [
        "eval",
        str(ship),
        str(tmp_path / "set"),
        "-p",
        "emoji-rec",
        "--num",
        "4",
        "--set",
        "images.sizes=[]",
        "--set",
        "images.fit=squash",
    ]
    back += ["--split", "test", "--metrics", "psnr,codebook", "--out", str(tmp_path / "back.json")]
    done = CliRunner().invoke(app, back)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "back.json").read_text())["networks"] == {}  # no network is asked
    write_card(text, ship, tmp_path / "found.json", tmp_path / "back.json", machine="a test machine")
    card = (ship / "README.md").read_text()
    found = json.loads(command.stdout)
    row_ = next(r for r in found["rows"] if (r["split"], r["images"]) == ("test", "generated"))
    for shown in ("pipeline_tag: text-to-image", "2. 手紙", f"| {row_['top1']:.1%} (", "guidance_scale 2.0", "PSNR"):
        assert shown in card
    assert Image.open(ship / "card" / "samples.png").width > 10
    nobody = CliRunner().invoke(app, ["retrieval", str(drawer.folder / "model"), str(tmp_path / "set")])
    assert nobody.exit_code == 2 and "has no matcher beside it: give --matcher" in " ".join(nobody.output.split())


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return open_matcher(run / "model").state_dict()
