"""Pipelines: arguments and outputs as in diffusers, editing, and opening by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from tests.test_models import random_images, tiny_pair
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, Rng
from varkit.pipelines.auto import create_pipeline, open_tokenizer, zoo_models
from varkit.pipelines.base import generate
from varkit.pipelines.edit import box_mask, image_to_tensor, keep_pyramid, mask_to_tensor
from varkit.pipelines.labels import Labelled
from varkit.registry import list_checkpoints
from varkit.tokenizers.multiscale_vq import MultiScaleVQ

NAMES = {"0": "Boot", "1": "Coat", "2": "Bag"}


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToImagePipeline:
    pipe = ClassToImagePipeline(*tiny_pair("var_fashion"), NextGroupSampler(guidance_scale=2.0, top_p=0.9), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ids(pipe: Any, *args: Any, **kwargs: Any) -> Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


# ---- calls --------------------------------------------------------------------------------------------------------


def test_output_types_show_the_same_images(pipe: ClassToImagePipeline) -> None:
    pil, array, tensor, tokens = (
        pipe([0, 2], seed=3, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    assert isinstance(pil[0], Image.Image) and array.shape == (2, 8, 8, 3) and tensor.shape == (2, 3, 8, 8)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(i) for i in pil]), (array * 255).round().astype(np.uint8))
    assert torch.equal(pipe.to_images(tokens, "pt"), tensor)
    assert pipe([0, 2], seed=3, output_type="latent", return_dict=False)[0].equal(tokens)
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, latent; got 'jpg'"):
        pipe([0], output_type="jpg")


def test_class_names_come_in_the_order_of_ids() -> None:
    """Files hold them in the order of text: 0, 1, 10, 11, 2."""

    class Named(Labelled):
        config = SimpleNamespace(id2label={str(i): f"class {i}" for i in sorted(range(12), key=str)})

    assert list(Named().labels) == list(range(12))


def test_classes_by_number_or_name(pipe: ClassToImagePipeline) -> None:
    assert torch.equal(ids(pipe, ["bag", "BOOT "], seed=0), ids(pipe, [2, 0], seed=0))
    assert torch.equal(ids(pipe, "Coat", seed=0), ids(pipe, 1, seed=0))
    assert pipe(["Bag"], seed=0).class_labels == [2]
    with pytest.raises(ValueError, match=r"no class is called 'Boott' \(did you mean 'boot'\?\); classes: Boot, Coat"):
        pipe(["Boott"])
    with pytest.raises(ValueError, match="class 4 does not exist: this model has classes 0 to 2"):
        pipe([4])
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipe([])


def test_no_class_draws_one_for_each_image(pipe: ClassToImagePipeline) -> None:
    drawn = pipe(num_images_per_prompt=60, seed=1, guidance_scale=1.0).class_labels
    assert set(drawn) == {0, 1, 2}
    assert pipe(num_images_per_prompt=60, seed=1, guidance_scale=1.0).class_labels == drawn


def test_several_images_a_label_come_side_by_side(pipe: ClassToImagePipeline) -> None:
    out = pipe([0, 1], num_images_per_prompt=2, seed=0, output_type="latent")
    assert out.class_labels == [0, 0, 1, 1] and len(out.images.unique(dim=0)) == 4
    assert torch.equal(out.images, ids(pipe, [0, 0, 1, 1], seed=0))
    with pytest.raises(ValueError, match="num_images_per_prompt must be at least 1"):
        pipe([0], num_images_per_prompt=0)


def test_sources_of_randomness(pipe: ClassToImagePipeline) -> None:
    def torch_generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    same = ids(pipe, [0, 1], generator=torch_generator(5))
    assert torch.equal(same, ids(pipe, [0, 1], generator=torch_generator(5)))
    assert not torch.equal(same, ids(pipe, [0, 1], generator=torch_generator(6)))
    each = ids(pipe, [0, 1], generator=[torch_generator(1), torch_generator(2)])
    assert torch.equal(each[1:], ids(pipe, [1], generator=[torch_generator(2)]))
    torch.manual_seed(0)
    first, second = ids(pipe, [0, 1]), ids(pipe, [0, 1])
    torch.manual_seed(0)
    assert torch.equal(first, ids(pipe, [0, 1])) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="at most one of generator=, seed= and rng="):
        pipe([0], seed=1, rng=Rng.from_seed(0, 1))
    with pytest.raises(ValueError, match="rng= holds 2 images, but 1 are to be made"):
        pipe([0], rng=Rng.from_seed(0, 2))
    with pytest.raises(ValueError, match="2 generators for 1 images"):
        pipe([0], generator=[torch_generator(1), torch_generator(2)])


def test_settings_of_the_call_replace_the_models_own(pipe: ClassToImagePipeline) -> None:
    assert torch.equal(ids(pipe, [0], seed=0), ids(pipe, [0], seed=0, guidance_scale=2.0, top_p=0.9))
    assert not torch.equal(ids(pipe, [0] * 8, seed=0), ids(pipe, [0] * 8, seed=0, guidance_scale=8.0))
    with pytest.raises(ValueError, match="no guidance schedule is called 'linaer'"):
        pipe([0], guidance_schedule="linaer")


def test_callback_sees_tokens_grow(pipe: ClassToImagePipeline) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(owner: Any, step: int, position: int, values: dict[str, Any]) -> None:
        assert owner is pipe
        seen.append((step, position, values["tokens"].shape[1]))

    out = pipe([0], seed=0, callback_on_step_end=note)
    assert seen == [(0, 0, 1), (1, 4, 5), (2, 20, 21)]
    assert out.stats["steps"] == out.stats["network_calls"] == 3 and out.stats["seconds"] > 0


def test_a_set_of_images_depends_on_no_batch_size(pipe: ClassToImagePipeline) -> None:
    sets = [list(generate(pipe, [2, 0], 5, seed=4, batch_size=b)) for b in (1, 2, 5)]
    assert [(i, c) for i, c, _ in sets[0]] == [(0, 2), (1, 0), (2, 2), (3, 0), (4, 2)]
    for other in sets[1:]:
        assert all(np.array_equal(a, b) for (_, _, a), (_, _, b) in zip(sets[0], other, strict=True))
    assert np.array_equal(sets[0][0][2], pipe([2], seed=4).images[0])


def test_parts_that_do_not_fit_make_no_pipeline() -> None:
    model, _ = tiny_pair("var_fashion")
    _, other = tiny_pair("toy_raster")
    with pytest.raises(ValueError, match=r"the transformer .* the image tokenizer .*do not fit together|do not fit"):
        ClassToImagePipeline(model, other, NextGroupSampler())


# ---- editing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["outside", "inside"])
def test_kept_tokens_stay_and_the_box_is_redrawn(pipe: ClassToImagePipeline, keep: str) -> None:
    images, box = random_images(pipe.image_tokenizer, 2), (0.0, 0.0, 0.5, 1.0)
    before = pipe.image_tokenizer.encode(images)
    after = pipe.edit(images, box=box, keep=keep, seed=0, output_type="latent").images
    grid = pipe.image_tokenizer.layout.grids[-1]
    kept = keep_pyramid(pipe.image_tokenizer.layout, box_mask(grid, box, keep))
    assert torch.equal(after[:, kept], before[:, kept])
    assert (after[:, ~kept] != before[:, ~kept]).float().mean() > 0.5
    assert kept.sum() not in (0, kept.numel())


def test_a_mask_is_the_box_it_draws(pipe: ClassToImagePipeline) -> None:
    images = random_images(pipe.image_tokenizer, 1)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    as_image = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    boxed = pipe.edit(images, box=(0, 0, 0.5, 1), seed=0, output_type="latent").images
    for form in (mask, mask[None, None], as_image, as_image.resize((32, 32), Image.Resampling.NEAREST)):
        assert torch.equal(pipe.edit(images, mask=form, seed=0, output_type="latent").images, boxed)


def test_an_edit_towards_a_class_and_several_a_picture(pipe: ClassToImagePipeline) -> None:
    images = random_images(pipe.image_tokenizer, 2)
    box = (0.0, 0.0, 0.5, 1.0)
    no_class = pipe.edit(images, box=box, seed=0, output_type="latent")
    assert no_class.class_labels == [3, 3]
    coat = pipe.edit(images, box=box, class_labels="Coat", seed=0, guidance_scale=6.0, output_type="latent")
    assert coat.class_labels == [1, 1] and not torch.equal(coat.images, no_class.images)
    more = pipe.edit(images, box=box, class_labels=["Coat", 2], num_images_per_prompt=3, seed=0, output_type="latent")
    assert more.class_labels == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="2 images but 1 class labels"):
        pipe.edit(images, box=box, class_labels=[0])


def test_pictures_of_any_size_are_taken(pipe: ClassToImagePipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    out = pipe.edit(picture, box=(0, 0, 0.5, 1), seed=0)
    assert out.images[0].size == (8, 8)
    assert image_to_tensor(picture, (8, 8)).shape == (1, 3, 8, 8)
    small = Image.fromarray(np.full((8, 8, 3), 255, np.uint8))
    assert (image_to_tensor([small, small], (8, 8)) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of mask= and box="),
        ({"box": (0, 0, 1, 1), "mask": torch.ones(8, 8)}, ValueError, "exactly one of mask= and box="),
        ({"box": (0.5, 0, 0.5, 1)}, ValueError, r"box must be \(top, left, bottom, right\)"),
        ({"box": (0, 0, 1.5, 1)}, ValueError, "box must be"),
        ({"box": (0, 0, 1, 1), "keep": "all"}, ValueError, "keep must be 'outside'"),
        ({"mask": torch.full((8, 8), 2.0)}, ValueError, r"a mask must lie in \[0, 1\]"),
        ({"mask": "mask.png"}, TypeError, "mask must be a PIL image or a tensor"),
        ({"image": torch.zeros(1, 3, 9, 9), "box": (0, 0, 1, 1)}, ValueError, r"must be \(B, 3, 8, 8\)"),
        ({"image": torch.full((1, 3, 8, 8), 3.0), "box": (0, 0, 1, 1)}, ValueError, r"must lie in \[-1, 1\]"),
        ({"image": "photo.png", "box": (0, 0, 1, 1)}, TypeError, "image must be a PIL image"),
    ],
)
def test_edits_that_cannot_be_are_refused(
    pipe: ClassToImagePipeline, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe.edit(**{"image": torch.zeros(1, 3, 8, 8), **arguments})


def test_masks_of_coarser_scales_follow_the_finest() -> None:
    layout = tiny_pair("var_fashion")[1].layout
    everything = keep_pyramid(layout, torch.ones(4, 4))
    nothing = keep_pyramid(layout, torch.zeros(4, 4))
    assert everything.all() and nothing.sum() == 1 and nothing[0]  # the 1x1 scale always stays
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    assert keep_pyramid(layout, left)[1:5].tolist() == [True, False, True, False]
    assert mask_to_tensor(torch.ones(8, 8), (4, 4)).shape == (4, 4)


# ---- opening ------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_diffusers_format(pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassToImagePipeline" and index["transformer"] == ["varkit.generators.var", "VAR"]
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "sampler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "image_tokenizer/config.json",
        "image_tokenizer/diffusion_pytorch_model.safetensors",
    }
    again = AutoPipeline.from_pretrained(tmp_path)
    assert isinstance(again, DiffusionPipeline) and again.labels == {0: "Boot", 1: "Coat", 2: "Bag"}
    assert again.sampler.settings() == pipe.sampler.settings()
    half = AutoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and half.image_tokenizer.codebook.dtype == torch.float32
    half.set_progress_bar_config(disable=True)
    assert half([0], seed=0, output_type="pt").images.isfinite().all()
    assert isinstance(open_tokenizer(str(tmp_path)), MultiScaleVQ)
    assert isinstance(open_tokenizer(str(tmp_path / "image_tokenizer")), MultiScaleVQ)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_has_two_names_and_neither_warns(pipe: ClassToImagePipeline, name: str, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        half = AutoPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16})
    assert half.transformer.dtype == torch.bfloat16


def test_wrong_names_are_answered_with_what_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a shipped model, nor a folder.*did you mean 'var_d16.in1k_256'"):
        AutoPipeline.from_pretrained("var_d16.in1k_265")
    with pytest.raises(ValueError, match=r"an architecture without weights.*var_d16.in1k_256"):
        AutoPipeline.from_pretrained("var_d16")
    with pytest.raises(ValueError, match="neither a shipped model"):
        AutoPipeline.from_pretrained("../some/folder")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline; varkit opens ClassToImagePipeline"):
        AutoPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at 'nowhere'"):
        open_tokenizer("nowhere")
    with pytest.raises(ValueError, match="a pipeline is built around a generator"):
        create_pipeline("multiscale_vq_fashion")


def test_a_release_that_cannot_be_downloaded_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked: list[str] = []

    def offline(repo: str, filename: str) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked.append(f"{repo}/{filename}")
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for name in list_checkpoints("var_*"):
        with pytest.raises(ValueError, match=r"cannot be downloaded: offline.*varkit convert"):
            AutoPipeline.from_pretrained(name)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        open_tokenizer("multiscale_vq_f16.openimages")
    assert "FoundationVision/var/var_d36.pth" in asked and "FoundationVision/var/vae_ch160v4096z32.pth" in asked
    with pytest.raises(ValueError, match="is a tokenizer, not a pipeline"):
        AutoPipeline.from_pretrained("multiscale_vq_f16.openimages")


def test_released_files_are_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole path of a released name, but for the network: the hub's function hands out local files."""
    from tests.test_checkpoints import small_tokenizer, small_var
    from varkit.checkpoints.files import write_official

    write_official(small_var(), tmp_path / "var_d16.pth")
    write_official(small_tokenizer(), tmp_path / "vae_ch160v4096z32.pth")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, filename: str(tmp_path / filename))
    pipe = AutoPipeline.from_pretrained("var_d16.in1k_256", torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.sampler.settings()["guidance_scale"] == 2.5 and pipe.sampler.settings()["top_k"] == 900
    assert open_tokenizer("multiscale_vq_f16.openimages").layout == pipe.image_tokenizer.layout


def test_zoo_models_are_listed() -> None:
    assert "fashion-var" in zoo_models()
