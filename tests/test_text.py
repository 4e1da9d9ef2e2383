"""Text as a condition: features, cleaning, the pipeline and the command."""

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

from tests.test_models import classes, random_images, tiny_pair
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, TextToImagePipeline
from varkit.cli import app
from varkit.conditioning.captions import clean_caption
from varkit.conditioning.text import TextCondition, left_padded
from varkit.data.crops import center_crop, random_crop, ten_crop

transformers = pytest.importorskip("transformers", reason="the extra text is not installed")

WORDS = ["a", "red", "cat", "dog", "on", "the", "blue", "mat", "</s>", "<pad>", "<unk>"]


def save_encoder(folder: Path) -> Path:
    """A T5 with 12 features and a tokenizer of ten words that ends each text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 8)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes, pad_token_id=9)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="encoder")
def _encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(name="pipe")
def _pipe(encoder: Path) -> TextToImagePipeline:
    sampler = NextGroupSampler(guidance_scale=2.0, guidance_schedule="constant")
    pipe = TextToImagePipeline(*tiny_pair("llamagen_t2i_xl"), sampler, text_encoder_name=str(encoder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ids(pipe: Any, *args: Any, **settings: Any) -> torch.Tensor:
    return pipe(*args, output_type="latent", **{"seed": 0, **settings}).images


# ---- features -----------------------------------------------------------------------------------------------------


def test_real_features_move_to_the_end_in_order_and_padding_is_zero() -> None:
    sequence, mask = torch.randn(3, 5, 2), torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    moved, visible = left_padded(sequence, mask.long()).text
    assert visible.sum(1).tolist() == [5, 2, 0] and visible.dtype == torch.bool
    assert torch.equal(moved[0], sequence[0])
    assert torch.equal(moved[1, 3:], sequence[1, :2]) and not moved[1, :3].any() and not moved[2].any()


def test_a_prompt_becomes_the_encoders_features_padded_on_the_left(encoder: Path) -> None:
    condition = TextCondition(str(encoder), max_length=6)
    cond = condition.encode(prompt=["A red CAT", "dog"])
    sequence, mask = cond.text
    assert sequence.shape == (2, 6, 12) and mask.sum(1).tolist() == [4, 2] and not sequence[~mask].any()
    with torch.no_grad():
        alone = condition.encoder(input_ids=torch.tensor([[0, 1, 2, 8]])).last_hidden_state
    torch.testing.assert_close(sequence[:1, 2:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(condition.encode(prompt="dog").text[0], sequence[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="null_features"):
        condition.null(cond)
    null = TextCondition(str(encoder), null_features=torch.ones(6, 12)).null(cond)
    assert torch.equal(null.text[1], mask) and (null.text[0] == 1).all()


def test_long_prompts_are_cut_with_a_warning_or_refused(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    condition = TextCondition(str(encoder), max_length=4)
    with caplog.at_level(logging.WARNING, "varkit"):
        assert condition.encode(prompt="a red cat on the mat").text[1].all()
    assert "has 7 tokens; 4 are read: the rest is left out" in caplog.text
    condition.strict = True
    with pytest.raises(ValueError, match=r"has 7 tokens; 4 are read\. Shorten it"):
        condition.encode(prompt="a red cat on the mat")


def test_empty_prompts_are_refused_before_an_encoder_is_looked_for() -> None:
    condition = TextCondition("/nowhere/t5")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ["a cat", "  "]}, "prompt 1: it is empty. Write what to draw"),
        ({"prompt": "日本語"}, "prompt 0: nothing is left of '日本語' when it is cleaned"),
        ({"prompt": []}, "at least one text"),
        ({"prompt": [3]}, "prompt 0 must be a text; got int"),
        ({}, "exactly one of"),
        ({"prompt": "a", "features": torch.zeros(1, 2, 3)}, "exactly one of"),
        ({"features": torch.zeros(1, 2, 3)}, "mask="),
        ({"prompt": "a cat"}, "the text encoder '/nowhere/t5' cannot be opened"),
    ]
    for values, message in wrong:
        with pytest.raises(ValueError, match=message):
            condition.encode(**values)


def test_features_from_files_are_those_of_the_prompt(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    condition = TextCondition(str(encoder), max_length=6)
    cond = condition.encode(prompt=["a red cat", "dog"])
    rows = [s[m] for s, m in zip(*cond.text, strict=True)]
    np.save(tmp_path / "0.npy", rows[0][None].numpy())
    save_file({"features": rows[1].contiguous()}, tmp_path / "1.safetensors")
    again = TextCondition("/nowhere/t5", max_length=6).encode(features=[tmp_path / "0.npy", tmp_path / "1.safetensors"])
    assert torch.equal(again.text[0], cond.text[0]) and torch.equal(again.text[1], cond.text[1])
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(condition.encode(features=right, mask=mask).text[0], cond.text[0])
    with pytest.raises(FileNotFoundError, match="no such file of text features"):
        condition.encode(features=tmp_path / "gone.npy")
    np.save(tmp_path / "bad.npy", np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match=r"must hold floats \(n, E\)"):
        condition.encode(features=tmp_path / "bad.npy")


def test_cleaning_needs_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import varkit.conditioning.captions as captions

    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    assert (
        clean_caption("A <b>\ufb01ne</b> \uff23\uff21\uff34 &amp; “dog” <!-- x --><script>y</script>")
        == 'a fine cat "dog"'
    )
    assert clean_caption("see photo_1.jpg at https://a.com/b?c") == "see at ?c"
    assert clean_caption("a  plain cat") == "a plain cat"


# ---- the pipeline -------------------------------------------------------------------------------------------------


def test_the_prompt_and_its_negative_steer(pipe: TextToImagePipeline) -> None:
    both = ids(pipe, ["a red cat", "a blue dog"])
    assert both.shape == (2, 16) and not torch.equal(both[0], both[1])
    assert torch.equal(ids(pipe, "a red cat"), both[:1])
    assert not torch.equal(ids(pipe, "a red cat", negative_prompt="the mat"), both[:1])
    same = ids(pipe, ["a red cat", "a blue dog"], negative_prompt="the mat")
    assert torch.equal(same, ids(pipe, ["a red cat", "a blue dog"], negative_prompt=["the mat", "the mat"]))
    alike = ids(pipe, "a red cat", negative_prompt="a red cat", guidance_scale=5.0)
    assert torch.equal(alike, ids(pipe, "a red cat", guidance_scale=1.0))  # nothing to lead away from
    out = pipe(["dog", "cat"], num_images_per_prompt=2, seed=1, output_type="pt")
    assert out.images.shape == (4, 3, 8, 8) and out.prompts == ["dog", "dog", "cat", "cat"]
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts"):
        pipe(["a", "dog"], negative_prompt=["cat", "mat", "dog"])


def test_without_a_prompt_there_is_no_condition(pipe: TextToImagePipeline) -> None:
    free = ids(pipe)
    assert free.shape == (1, 16) and torch.equal(free, ids(pipe, guidance_scale=9.0))
    with pytest.raises(ValueError, match="prompt 0: it is empty"):
        pipe("")


def test_features_stand_in_for_prompts(pipe: TextToImagePipeline) -> None:
    sequence, mask = pipe.encode_prompt(["a red cat"]).text
    lengths = mask.sum(1)
    features = torch.zeros_like(sequence)
    features[0, : lengths[0]] = sequence[0, mask[0]]
    right = torch.arange(5)[None] < lengths[:, None]
    assert torch.equal(ids(pipe, features=features, features_mask=right), ids(pipe, "a red cat"))
    with pytest.raises(ValueError, match="not both"):
        pipe("a cat", features=features)


def test_saved_with_its_encoder_and_without(pipe: TextToImagePipeline, encoder: Path, tmp_path: Path) -> None:
    expected = ids(pipe, "a red cat")
    pipe.save_pretrained(tmp_path / "without")
    again = AutoPipeline.from_pretrained(tmp_path / "without")
    assert isinstance(again, TextToImagePipeline) and again.text_encoder is None
    assert torch.equal(ids(again, "a red cat"), expected)
    whole = TextToImagePipeline(
        pipe.transformer,
        pipe.image_tokenizer,
        pipe.sampler,
        transformers.T5EncoderModel.from_pretrained(encoder),
        transformers.AutoTokenizer.from_pretrained(encoder),
        text_encoder_name="/nowhere/t5",
    )
    whole.save_pretrained(tmp_path / "with")
    again = AutoPipeline.from_pretrained(tmp_path / "with")
    assert torch.equal(ids(again, "a red cat"), expected)


def test_an_edit_keeps_what_lies_outside_the_box(pipe: TextToImagePipeline) -> None:
    images = random_images(pipe.image_tokenizer, 2)
    kept = pipe.image_tokenizer.encode(images).view(2, 4, 4)
    edited = pipe.edit(images, box=(0, 0, 0.5, 0.5), prompt="a cat", seed=0, output_type="latent").images.view(2, 4, 4)
    assert torch.equal(edited[:, 2:], kept[:, 2:]) and torch.equal(edited[:, :, 2:], kept[:, :, 2:])
    with pytest.raises(ValueError, match="2 images but 3 prompts"):
        pipe.edit(images, box=(0, 0, 0.5, 0.5), prompt=["a", "cat", "dog"])
    with pytest.raises(ValueError, match="exactly one of mask= and box="):
        pipe.edit(images)


def test_parts_of_other_kinds_are_refused() -> None:
    model, tokenizer = tiny_pair("llamagen_b")
    with pytest.raises(ValueError, match="conditioned on a class, not on text"):
        TextToImagePipeline(model, tokenizer, NextGroupSampler())
    model, tokenizer = tiny_pair("llamagen_t2i_xl")
    with pytest.raises(ValueError, match="holds none"):
        model.start(classes(tiny_pair("llamagen_b")[0], 1))
    with pytest.raises(ValueError, match="conditioned on text"):
        ClassToImagePipeline(model, tokenizer, NextGroupSampler())


# ---- the command --------------------------------------------------------------------------------------------------


def test_varkit_sample_takes_prompts(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    common = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "grid.png"), "--json"]
    done = CliRunner().invoke(
        app, [*common, "--prompt", "a red cat", "--prompt", "dog", "--num", "3", "--guidance-interval", "0,3"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["prompts"] == ["a red cat", "dog", "a red cat"] and told["settings"]["guidance_interval"] == [0, 3]
    with Image.open(tmp_path / "grid.png") as image:
        assert "a red cat" in str(image.info)
    for wrong, message in (
        (["--class", "1"], "draws from texts: give --prompt"),
        (["--prompt", "cat", "--guidance-interval", "x"], "must be numbers separated by commas"),
        (["--prompt", " "], "prompt 0: it is empty"),
    ):
        done = CliRunner().invoke(app, [*common, *wrong])
        assert done.exit_code == 2 and message in done.stderr, done.output


# ---- crops --------------------------------------------------------------------------------------------------------


def test_ten_crops_are_corners_and_centre_of_a_square_and_of_its_mirror() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    image = Image.fromarray(pixels)
    square = center_crop(image, 35)
    crops = ten_crop(image, 32, 1.1)
    assert len(crops) == 10 and {c.size for c in crops} == {(32, 32)}
    assert crops[0].tobytes() == square.crop((0, 0, 32, 32)).tobytes()
    assert crops[3].tobytes() == square.crop((3, 3, 35, 35)).tobytes()
    for near, mirrored in ((0, 6), (1, 5), (2, 8), (3, 7)):
        flipped = crops[near].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert flipped.tobytes() == crops[mirrored].tobytes()
    assert center_crop(image, 70).tobytes() == image.crop((10, 0, 80, 70)).tobytes()
    with pytest.raises(ValueError, match="leaves the image"):
        random_crop(image, 32, short_side=32, crop_y=1, crop_x=0)
