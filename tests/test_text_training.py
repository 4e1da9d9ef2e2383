"""Captions in training: features encoded once, and generators of texts that learn from them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.test_text import _encoder  # noqa: F401
from tests.test_training import lines, recipe
from varkit import AutoPipeline, Rng, TextToImagePipeline, registry
from varkit.cli import app
from varkit.conditioning.text import TextCondition
from varkit.config import ConfigError
from varkit.data.codes import CodeSet, write_shard
from varkit.data.features import FeatureInfo, FeatureSet
from varkit.data.images import open_images
from varkit.data.shards import shard_file
from varkit.pipelines.extract_codes import extract_codes
from varkit.pipelines.extract_features import extract_features
from varkit.training.loop import Trainer, train
from varkit.training.objectives import build_objective, objective_config

pytest.importorskip("transformers", reason="the extra text is not installed")

TEXTS = ["A red cat", "a blue dog on the mat", "", "dog", "a RED cat ", "the mat", "cat on the red mat", "http://a.com"]
SAID = ["a red cat", "a blue dog on the mat", "dog", "the mat", "cat on the red mat"]
"""Distinct captions, as they are read: two say nothing, two are the same once cleaned."""


def captioned(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for i, text in enumerate(texts):
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    return captioned(tmp_path / "images", TEXTS)


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    entry = registry.model_entry("llamagen_t2i_small_64")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    registry.create_model(entry.tokenizer, **entry.tiny_tokenizer).save_pretrained(folder)
    return str(folder)


def encoded(encoder: Path, images: Path, out: Path, **choices: Any) -> FeatureSet:
    choices = {"max_length": 6, "shard_size": 2, "batch_size": 2, "store": "float32", **choices}
    extract_features(str(encoder), [str(images)], out, **choices)
    return FeatureSet(out)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---- features -----------------------------------------------------------------------------------------------------


def test_each_caption_is_encoded_once_as_a_prompt_would_be(encoder: Path, images: Path, tmp_path: Path) -> None:
    stored = encoded(encoder, images, tmp_path / "features")
    assert len(stored) == len(SAID) and sorted(stored.find(SAID)) == list(range(len(SAID)))
    assert stored.find(["a cat", "dog"])[0] == -1 and stored.find(["dog"]) == [2]
    sequence, mask = TextCondition(str(encoder), max_length=6).encode(prompt=SAID).text
    for text, row, real in zip(SAID, sequence, mask, strict=True):
        (number,) = stored.find([text])
        torch.testing.assert_close(stored[number], row[real], atol=1e-5, rtol=1e-5)
    half = encoded(encoder, images, tmp_path / "half", store="float16")
    assert half[0].dtype == torch.float16 and half.info.fingerprint == stored.info.fingerprint
    torch.testing.assert_close(half[1].float(), stored[1], atol=2e-3, rtol=2e-3)


def test_a_stopped_run_goes_on_and_ends_alike(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(encoder, images, tmp_path / "whole")
    states, calls = TextCondition.states, 0

    def stop(self: TextCondition, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return states(self, *arguments)

    monkeypatch.setattr(TextCondition, "states", stop)
    with pytest.raises(KeyboardInterrupt):
        encoded(encoder, images, tmp_path / "stopped")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing .*00002.safetensors.*varkit features"):
        FeatureSet(tmp_path / "stopped")
    shard_file(tmp_path / "stopped", 0).write_bytes(b"half a shard")  # as a full disk may leave it
    said: list[str] = []
    encoded(encoder, images, tmp_path / "stopped", announce=said.append)
    assert said == ["2 captions are there already"]
    assert files(tmp_path / "stopped") == files(whole.folder)
    for process in (1, 0):
        extract_features(
            str(encoder),
            [str(images)],
            tmp_path / "two",
            max_length=6,
            shard_size=2,
            batch_size=2,
            store="float32",
            process_index=process,
            num_processes=2,
        )
    assert files(tmp_path / "two") == files(whole.folder)


def test_token_files_and_several_sets_share_a_folder(
    encoder: Path, tokenizer: str, images: Path, tmp_path: Path
) -> None:
    extract_codes(tokenizer, str(images), tmp_path / "codes")
    more = captioned(tmp_path / "more", ["the dog", "dog"])
    done = extract_features(str(encoder), [str(tmp_path / "codes"), str(more)], tmp_path / "features", max_length=6)
    assert (done.images, done.captions, done.empty) == (10, 6, 2)
    assert FeatureSet(tmp_path / "features").find(["the dog", "a red cat"]) == [5, 0]
    with pytest.raises(ValueError, match="holds text features, not token files"):
        CodeSet(tmp_path / "features")
    with pytest.raises(ValueError, match="holds token files, not text features"):
        FeatureInfo.read(tmp_path / "codes")


def test_long_captions_are_cut_and_counted_or_refused(
    encoder: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "varkit"):
        stored = encoded(encoder, images, tmp_path / "cut", max_length=4)
    assert "2 captions have more than 4 tokens" in caplog.text
    assert max(len(stored[i]) for i in range(len(stored))) == 4
    with pytest.raises(ValueError, match="2 of 5 captions have more than 4 tokens; the first has 7: 'a blue dog"):
        encoded(encoder, images, tmp_path / "strict", max_length=4, strict=True)
    assert not (tmp_path / "strict").exists()


def test_features_that_overflow_are_refused_and_leave_no_shard(encoder: Path, images: Path, tmp_path: Path) -> None:
    condition = TextCondition(str(encoder), max_length=6)
    condition.open()
    with torch.no_grad():
        condition.encoder.encoder.final_layer_norm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"not finite in .*float16; store float32"):
        extract_features(condition, [str(images)], tmp_path / "features")
    assert sorted(files(tmp_path / "features")) == ["layout.json"]
    extract_features(condition, [str(images)], tmp_path / "wide", store="float32")
    assert len(FeatureSet(tmp_path / "wide")) == len(SAID)


def test_features_made_otherwise_and_sets_without_captions_are_refused(
    encoder: Path, images: Path, tmp_path: Path
) -> None:
    encoded(encoder, images, tmp_path / "features")
    for changes, message in (
        ({"max_length": 7}, "holds text features made otherwise .max_length: 6 there, 7 now"),
        ({"store": "float16"}, "dtype: 'float32' there, 'float16' now"),
        ({"clean": False}, "cleaned: True there, False now"),
        ({"store": "int8"}, "stored as float16 or float32; got 'int8'"),
        ({"batch_size": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            encoded(encoder, images, tmp_path / "features", **changes)
    for texts, message in (([], "has no captions"), (["", " "], "all 2 captions of .* are empty")):
        folder = captioned(tmp_path / f"set{len(texts)}", texts or ["", ""])
        if not texts:
            (folder / "metadata.jsonl").unlink()
        with pytest.raises(ValueError, match=message):
            encoded(encoder, folder, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_commands_say_what_they_did(encoder: Path, tokenizer: str, images: Path, tmp_path: Path) -> None:
    command = ["features", str(images), "--encoder", str(encoder), "--max-length", "5", "--out", str(tmp_path / "f")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "5 distinct ones of 8 images, 2 images without any, 2 cut to 5 tokens" in done.output
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["made"], told["there"], told["cut"]) == (0, 5, 2)
    wrong = CliRunner().invoke(app, ["features", str(images), "--encoder", "/nowhere", "--out", str(tmp_path / "g")])
    assert wrong.exit_code == 2 and "the text encoder '/nowhere' cannot be opened" in wrong.output

    trained = objective(tokenizer, features=str(tmp_path / "f"))
    trained.export(tmp_path / "model")
    common = ["sample", str(tmp_path / "model"), "--json", "--out", str(tmp_path / "grid.npz")]
    np.save(tmp_path / "dog.npy", FeatureSet(tmp_path / "f")[2].float().numpy())
    drawn = []
    for given in (
        ["--prompt", "Dog"],
        ["--prompt", "Dog", "--features", str(tmp_path / "f")],
        ["--features", str(tmp_path / "dog.npy")],
    ):
        done = CliRunner().invoke(app, [*common, *given])
        assert done.exit_code == 0, done.output
        drawn.append(np.load(tmp_path / "grid.npz")["arr_0"])
    assert np.array_equal(drawn[1], drawn[2])
    for given, message in (
        (["--features", str(tmp_path / "f")], "holds features of 5 captions; say which by --prompt"),
        (["--features", str(tmp_path / "f"), "--prompt", "a cow"], "has no features of 'a cow'"),
        (["--features", str(tmp_path / "dog.npy"), "--prompt", "dog"], "files, which stand for prompts"),
        (["--features", str(tmp_path / "gone.npy")], "no such file of text features"),
    ):
        done = CliRunner().invoke(app, [*common, *given])
        assert done.exit_code == 2 and message in done.stderr, done.output


# ---- training -----------------------------------------------------------------------------------------------------


def plan(tokenizer: str, **changes: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2}
    values = {"name": "next-token", "model": "llamagen_t2i_small_64", "model_overrides": sizes}
    return {**values, "tokenizer": tokenizer, "sampling": {"guidance_scale": 2.0}} | changes


def objective(tokenizer: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(objective_config(plan(tokenizer, **changes)), [])


def test_cached_features_and_those_made_on_the_fly_give_one_loss(
    encoder: Path, tokenizer: str, images: Path, tmp_path: Path
) -> None:
    encoded(encoder, images, tmp_path / "features")
    cached = objective(tokenizer, features=str(tmp_path / "features"))
    sizes = plan(tokenizer)["model_overrides"] | {"text_length": 6}
    fresh = objective(tokenizer, text_encoder=str(encoder), model_overrides=sizes)
    assert "text_encoder" in fresh.frozen_parts() and "text_encoder" not in dict(fresh.named_children())
    assert fresh.state_dict().keys() == cached.state_dict().keys()
    with torch.no_grad():  # at initialisation the output is zero: every loss is the same
        for weight, other in zip(cached.model.parameters(), fresh.model.parameters(), strict=True):
            weight.add_(0.2 * torch.randn_like(weight))
            other.copy_(weight)
        fresh.model.cls_embedding.uncond_embedding.copy_(cached.model.cls_embedding.uncond_embedding)
    data = open_images(images)
    batch = {"tokens": torch.randint(0, 7, (8, cached.model.layout.length)), "labels": torch.full((8,), -1)}
    batch |= {"keys": torch.arange(8), "texts": data.texts}
    losses = []
    for training in (cached, fresh):
        training.check_texts("data.train", data.texts)
        training.eval()
        losses.append(training.validate(batch, Rng.from_seed(0, 8))["loss"])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    other = batch | {"texts": data.texts[::-1]}
    assert (cached.validate(other, Rng.from_seed(0, 8))["loss"] - losses[0]).abs() > 1e-4

    prompts = [text for text in TEXTS if text not in ("", "http://a.com")]
    said = torch.tensor([text in prompts for text in TEXTS])
    sequence, mask = cached.cond(batch).text
    expected = TextCondition(str(encoder), max_length=6).encode(prompt=prompts).text
    torch.testing.assert_close(sequence[said], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(mask[said], expected[1])
    none = cached._pipeline().no_prompt().text  # what is drawn without a prompt
    assert torch.equal(sequence[~said], none[0].expand(2, -1, -1)) and mask[~said].all()


@pytest.mark.parametrize("source", ["features", "text_encoder"])
def test_a_run_resumes_exactly_and_exports_what_draws_prompts(
    source: str, encoder: Path, tokenizer: str, images: Path, tmp_path: Path
) -> None:
    held_out = captioned(tmp_path / "held", ["the blue cat", "dog", ""])
    changes = [f"data.train={images}", f"data.validation={held_out}", "loop.steps=4", "loop.validate_every=2"]
    changes += ["loop.sample_every=2", "loop.save_every=2", "data.flip=false", "data.train_split=train"]
    if source == "features":
        sets = [str(images), str(held_out)]
        extract_features(str(encoder), sets, tmp_path / "features", max_length=6, shard_size=3)
        chosen = plan(tokenizer, features=str(tmp_path / "features"), self_generated={})
    else:
        sizes = plan(tokenizer)["model_overrides"] | {"text_length": 6}
        chosen = plan(tokenizer, text_encoder=str(encoder), model_overrides=sizes)
    whole = train(recipe(tmp_path / "whole", chosen, *changes))
    assert sum("validation/loss" in line for line in lines(whole.folder)) == 2
    assert len(list((whole.folder / "samples").glob("*.png"))) == 2
    again = recipe(tmp_path / "again", chosen, *changes)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (whole.folder / "checkpoints" / "step-00000002").rename(tmp_path / "again" / "checkpoints" / "step-00000002")
    resumed = train(again, resume=True)
    model = Path("model", "transformer", "diffusion_pytorch_model.safetensors")
    assert (whole.folder / model).read_bytes() == (resumed.folder / model).read_bytes()
    pipeline = AutoPipeline.from_pretrained(resumed.folder / "model")
    assert isinstance(pipeline, TextToImagePipeline) and pipeline.config.text_encoder_name == str(encoder)
    pictures = pipeline(["a red cat", "dog"], seed=0, output_type="pt").images
    assert pictures.shape[0] == 2 and pictures.isfinite().all()


def test_from_token_files_and_on_from_a_trained_model(
    encoder: Path, tokenizer: str, images: Path, tmp_path: Path
) -> None:
    extract_codes(tokenizer, str(images), tmp_path / "codes")
    encoded(encoder, images, tmp_path / "features", clean=False)
    chosen = plan(tokenizer, features=str(tmp_path / "features"))
    changes = [f"data.train={tmp_path / 'codes'}", "data.validation=null", "loop.steps=2", "data.flip=false"]
    first = train(recipe(tmp_path / "first", chosen, *changes))
    more = chosen | {"init_from": str(first.model), "model_overrides": {}}
    trainer = Trainer(recipe(tmp_path / "second", more, *changes), False)
    told = " ".join(trainer.objective.notes)
    assert "conditioned on text" in told and "1 of 8 images have no caption" in told
    pipeline, model = AutoPipeline.from_pretrained(first.model), trainer.objective.trained("main")
    assert not pipeline.config.clean_prompts
    null = "cls_embedding.uncond_embedding"  # drawn once, never trained
    assert torch.equal(model.get_buffer(null), pipeline.transformer.get_buffer(null))


def test_what_does_not_go_together_is_refused_before_the_run(
    encoder: Path, tokenizer: str, images: Path, tmp_path: Path
) -> None:
    encoded(encoder, images, tmp_path / "features")
    stored = {"features": str(tmp_path / "features")}
    sizes = plan(tokenizer)["model_overrides"]
    for changes, message in (
        ({}, "conditioned on text: give objective.features"),
        (stored | {"text_encoder": str(encoder)}, "objective.features and objective.text_encoder both"),
        (stored | {"model": "llamagen_fashion"}, "objective.features is for generators of texts"),
        (stored | {"model_overrides": sizes | {"text_dim": 16}}, "features of 12 numbers, at most 6 tokens"),
        (stored | {"model_overrides": sizes | {"text_length": 5}}, "reads 12 numbers and 5 tokens"),
        (stored | {"model_overrides": sizes | {"num_classes": 3}}, "num_classes=3 does not go with"),
        ({"features": str(tmp_path / "gone")}, "make text features with `varkit features`"),
        ({"text_encoder": "/nowhere/t5"}, "cannot be opened"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError, ValueError), match=message):
            objective(tokenizer, **changes)
    classes = build_objective(objective_config(plan(tokenizer, model="llamagen_small_64")), ["a"])
    classes.export(tmp_path / "of-classes")
    with pytest.raises(ConfigError, match=r"is conditioned on class, objective.model .* on text"):
        objective(tokenizer, **stored, init_from=str(tmp_path / "of-classes"), model_overrides={})

    slice_ = "tests/data/fashion_slice.npz"
    unknown = captioned(tmp_path / "unknown", ["a red cat", "a red dog"])
    silent = captioned(tmp_path / "silent", ["", " "])
    for data, message in (
        ({"train": images, "validation": slice_}, "data.validation has no captions"),
        (
            {"train": unknown, "validation": images},
            "1 of 2 captions of data.train are not in .*; the first is 'a red dog'",
        ),
        ({"train": silent, "validation": images}, "data.train: all 2 captions are empty"),
    ):
        changes_ = [f"data.{key}={value}" for key, value in data.items()]
        with pytest.raises(ConfigError, match=message):
            train(recipe(tmp_path / "run", plan(tokenizer, **stored), *changes_))
    assert not (tmp_path / "run").exists()


def test_a_trained_caption_draws_its_image(encoder: Path, tokenizer: str, tmp_path: Path) -> None:
    """By heart: after some steps the likeliest tokens of each caption are those of its image."""
    said = ["a red cat", "the blue mat", "dog"]
    images, codes = captioned(tmp_path / "images", said), tmp_path / "codes"
    extract_codes(tokenizer, str(images), codes)
    tokens = torch.tensor([3, 11, 20])[:, None].expand(3, 16)  # one code an image
    write_shard(codes, 0, tokens[:, None].to(torch.uint16), torch.full((3,), -1), torch.arange(3), said)
    encoded(encoder, images, tmp_path / "features", store="float16")
    rates = ("dropout", "token_dropout", "ffn_dropout", "cond_drop_rate")
    sizes = plan(tokenizer)["model_overrides"] | dict.fromkeys(rates, 0.0)
    chosen = plan(tokenizer, features=str(tmp_path / "features"), model_overrides=sizes)
    changes = [f"data.train={codes}", "data.validation=null", "data.flip=false", "loop.steps=40", "optim.lr=1e-2"]
    changes += ["loop.sample_every=0", "loop.save_every=0", "loop.ema_decay=0", "loop.batch_size=6"]
    pipeline = AutoPipeline.from_pretrained(train(recipe(tmp_path / "run", chosen, *changes)).model)
    drawn = pipeline(said, top_k=1, guidance_scale=1.0, seed=0, output_type="latent").images
    assert torch.equal(drawn, tokens)
