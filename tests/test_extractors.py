"""Images -> control maps."""

from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varkit.conditioning import extractors
from varkit.conditioning.extractors import EXTRACTORS, build_extractor
from varkit.conditioning.extractors.depth import Depth
from varkit.conditioning.extractors.hed import HEDNetwork
from varkit.conditioning.extractors.lineart import LineArtNetwork
from varkit.conditioning.extractors.palettes import palette_colours
from varkit.conditioning.extractors.segmentation import Segmentation


def white_square(size: int = 64, inset: int = 16) -> Tensor:
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    image[:, inset:-inset, inset:-inset] = 255
    return image


def noise(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


# ---- Canny ------------------------------------------------------------------------------------------------------


def test_canny_of_a_square_is_its_outline() -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    (edges,) = build_extractor("canny")(white_square())
    assert edges.dtype == torch.uint8 and set(edges.unique().tolist()) == {0, 255}
    rows, columns = edges.nonzero(as_tuple=True)
    for axis in (rows, columns):  # a closed ring, within a pixel of the border at 16 and 48
        assert 15 <= int(axis.min()) <= 16 and 47 <= int(axis.max()) <= 48
    distance = torch.minimum(torch.minimum(rows - 16, columns - 16).abs(), torch.minimum(47 - rows, 47 - columns).abs())
    assert int(distance.max()) <= 1
    assert len(rows) >= 4 * 28


def test_canny_of_a_batch_is_that_of_each_image() -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    images = noise(3, 40, 24)
    canny = build_extractor("canny", low=50, high=120)
    together = canny(images)
    assert together.shape == (3, 40, 24)
    for image, edges in zip(images, together, strict=True):
        assert torch.equal(canny(image[None])[0], edges)


def test_canny_thresholds_count() -> None:
    """A step of 30 grey levels has a gradient of 4 * 30 = 120: beneath 200, above 100."""
    pytest.importorskip("cv2", reason="the extra control is not installed")
    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 30
    assert not build_extractor("canny")(image).any()
    assert build_extractor("canny", low=50, high=110)(image).any()


@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 5), (0, float("inf")), (float("nan"), 5)])
def test_canny_refuses_thresholds(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 <= low <= high"):
        build_extractor("canny", low=low, high=high)


def test_canny_without_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"varkit\[control\]"):
        build_extractor("canny")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 8, 8, 3),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(0, 8, 8, 3, dtype=torch.uint8),
    ],
    ids=["float", "channels-first", "no-batch", "empty"],
)
def test_other_images_are_refused(images: Tensor) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\)"):
        build_extractor("canny")(images)


# ---- networks of released files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="weights")
def _weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights under the released names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    hed = HEDNetwork()
    with torch.no_grad():
        hed.norm.fill_(110.0)
    torch.save(hed.state_dict(), folder / "ControlNetHED.pth")
    torch.save(LineArtNetwork().state_dict(), folder / "model.pth")
    return folder


@pytest.mark.parametrize("name", ["hed", "lineart", "lineart-white"])
def test_a_map_is_of_the_images_size_and_its_own(name: str, weights: Path) -> None:
    """Odd sides too; an image's map does not depend on its batch."""
    extractor = build_extractor(name, weights=weights)
    images = noise(3, 33, 22)
    maps = extractor(images)
    assert maps.shape == (3, 33, 22) and maps.dtype == torch.uint8
    alone = torch.cat([extractor(image[None]) for image in images])
    assert int((alone.int() - maps.int()).abs().max()) <= 1  # rounding
    assert float((extractor.floats(images) - maps).abs().max()) <= 0.5 + 1e-4  # type: ignore[attr-defined]


def test_lines_have_two_polarities(weights: Path) -> None:
    images = noise(2, 24, 32)
    black, white = (build_extractor(name, weights=weights)(images).int() for name in ("lineart", "lineart-white"))
    assert black.float().std() > 1
    network = build_extractor("lineart", weights=weights).network  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = 255 * network(images.permute(0, 3, 1, 2).float())[:, 0]
    assert float((black - wanted).abs().max()) <= 0.51  # as the network draws: black on white, fed RGB in 0 .. 255
    assert int((black + white - 255).abs().max()) <= 1


def test_hed_is_fed_rgb(weights: Path) -> None:
    images, hed = noise(1, 32, 24), build_extractor("hed", weights=weights)
    with torch.no_grad():
        wanted = hed.network(images.permute(0, 3, 1, 2).float())  # type: ignore[attr-defined]
    torch.testing.assert_close(hed.floats(images), wanted)  # type: ignore[attr-defined]


def test_hed_of_one_colour_is_flat_and_edges_are_not(weights: Path) -> None:
    hed = build_extractor("hed", weights=weights)
    flat, square = hed(torch.full((1, 64, 64, 3), 110, dtype=torch.uint8)), hed(white_square())
    middle = (slice(None), slice(24, 40), slice(24, 40))
    assert int(flat[middle].int().max() - flat[middle].int().min()) <= int(square.int().max() - square.int().min())
    assert not torch.equal(flat, square)


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VARKIT_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file in (("hed", "ControlNetHED.pth"), ("lineart", "model.pth")):
        with pytest.raises(FileNotFoundError, match=file) as told:
            build_extractor(name)
        assert "huggingface.co" in str(told.value) and str(tmp_path) in str(told.value)


def test_weights_are_found_by_the_variable(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.setenv("VARKIT_WEIGHTS", str(weights))
    assert build_extractor("hed")(noise(1, 16, 16)).shape == (1, 16, 16)


def test_other_files_are_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights of hed"):
        build_extractor("hed", weights=weights / "model.pth")
    (tmp_path / "ControlNetHED.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="plain tensors"):
        build_extractor("hed", weights=tmp_path)


def test_small_images_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="16 pixels"):
        build_extractor("hed", weights=weights)(noise(1, 15, 40))
    with pytest.raises(ValueError, match="8 pixels"):
        build_extractor("lineart", weights=weights)(noise(1, 40, 7))


# ---- networks of transformers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="dpt")
def _dpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    folder = tmp_path_factory.mktemp("dpt")
    torch.manual_seed(4)
    config = transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    transformers.DPTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(folder)
    return folder


def test_depth_is_that_of_transformers(dpt: Path) -> None:
    import transformers

    images = noise(1, 96, 96)
    processor = transformers.AutoImageProcessor.from_pretrained(dpt)
    inputs = processor(images=[images[0].permute(2, 0, 1)], return_tensors="pt", size={"height": 96, "width": 96})
    with torch.no_grad():
        (wanted,) = transformers.DPTForDepthEstimation.from_pretrained(dpt).eval()(**inputs).predicted_depth
    depth = Depth(dpt)
    torch.testing.assert_close(depth.raw(images)[0], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(depth.floats(images)[0], wanted * 255 / wanted.max(), rtol=1e-3, atol=0.1)


def test_depth_is_scaled_by_its_rule(dpt: Path) -> None:
    """Odd sides; each map is scaled by itself."""
    images = torch.cat([noise(1, 50, 70), white_square(100, 20)[:, :50, :70]])
    by_maximum, spread = build_extractor("depth", model=dpt)(images), build_extractor("depth-midas", model=dpt)(images)
    assert by_maximum.shape == spread.shape == (2, 50, 70) and by_maximum.dtype == torch.uint8
    assert by_maximum.amax((1, 2)).tolist() == [255, 255]
    assert spread.amin((1, 2)).tolist() == [0, 0] and min(spread.amax((1, 2)).tolist()) >= 254
    at_size = build_extractor("depth", model=dpt, size=32)(images)
    assert at_size.shape == (2, 50, 70) and not torch.equal(at_size, by_maximum)


def test_the_rules_of_scaling(dpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its maximum, to the nearest level; from its minimum to its maximum, truncated; flat maps are black."""
    said = torch.tensor([[[2.0, 4.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for scaling, wanted in (("max", [[85, 170], [128, 255]]), ("min-max", [[0, 127], [63, 255]])):
        depth = Depth(dpt, scaling=scaling)  # type: ignore[arg-type]
        monkeypatch.setattr(depth, "raw", lambda images: said)
        assert depth(noise(2, 2, 2)).tolist() == [wanted, [[0, 0], [0, 0]]]


def test_a_hybrid_sees_its_own_square(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="the extra text is not installed")
    torch.manual_seed(6)
    backbone = transformers.BitConfig(
        global_padding="same", layer_type="bottleneck", depths=[1, 1, 1], embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"], hidden_sizes=[16, 16, 32], embedding_size=8, num_groups=2,
    )  # fmt: skip
    config = transformers.DPTConfig(
        image_size=64, hidden_size=32, fusion_hidden_size=16, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
        num_attention_heads=2, intermediate_size=32, is_hybrid=True, backbone_config=backbone,
        backbone_featmap_shape=[1, 32, 4, 4], neck_hidden_sizes=[16, 16, 16, 16], neck_ignore_stages=[0, 1],
        readout_type="project", initializer_range=0.3,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path)
    transformers.DPTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    maps = build_extractor("depth-midas", model=tmp_path)(noise(2, 80, 48))
    assert maps.shape == (2, 80, 48) and maps.amin((1, 2)).tolist() == [0, 0]


def test_depth_refuses_other_arguments(dpt: Path) -> None:
    with pytest.raises(ValueError, match="max or min-max"):
        build_extractor("depth", model=dpt, scaling="log")
    with pytest.raises(ValueError, match="multiple of 32"):
        build_extractor("depth", model=dpt, size=50)


def segmenter(folder: Path, classes: int, universal: bool) -> Path:
    transformers: Any = pytest.importorskip("transformers", reason="the extra text is not installed")
    torch.manual_seed(5)
    if universal:
        backbone = transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
            dim_feedforward=16, num_attention_heads=2, encoder_layers=1, decoder_layers=2, num_queries=6,
            num_labels=classes,
        )  # fmt: skip
        transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
        processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    else:
        config = transformers.SegformerConfig(
            depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
            num_labels=classes, initializer_range=1.0,
        )  # fmt: skip
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
        processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("palette", "classes", "universal"), [("ade20k", 150, True), ("coco-stuff", 171, False)])
def test_classes_become_colours(palette: str, classes: int, universal: bool, tmp_path: Path) -> None:
    folder = segmenter(tmp_path, classes, universal)
    images = noise(2, 48, 40)
    seg = Segmentation(folder, palette=palette)
    ids, colours = seg.ids(images), seg(images)
    assert ids.shape == (2, 48, 40) and colours.shape == (2, 48, 40, 3) and colours.dtype == torch.uint8
    assert len(ids.unique()) > 1
    assert torch.equal(colours, palette_colours(palette)[ids.long()])
    assert torch.equal(build_extractor("seg", model=folder, palette="ids")(images), ids)


def test_a_palette_of_other_classes_is_refused(tmp_path: Path) -> None:
    folder = segmenter(tmp_path, 7, False)
    with pytest.raises(ValueError, match="7 classes, the palette ade20k 150"):
        build_extractor("seg", model=folder)
    with pytest.raises(ValueError, match="coco-stuff"):
        build_extractor("seg", model=folder, palette="coco-stuf")
    assert int(build_extractor("seg", model=folder, palette="ids")(noise(1, 32, 32)).max()) < 7


def test_palettes_are_those_of_the_data_sets() -> None:
    """Wall, building and sky of ADE20K; person of COCO-Stuff."""
    ade, coco = palette_colours("ade20k"), palette_colours("coco-stuff")
    assert ade.shape == (150, 3) and coco.shape == (171, 3)
    assert ade[:3].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230]] and coco[0].tolist() == [0, 192, 64]


@pytest.mark.parametrize(("name", "what"), [("depth", "depth"), ("seg", "segmentation")])
def test_a_folder_without_a_network_is_named(name: str, what: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra text is not installed")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"{what}: .*notes\.txt.*preprocessor_config\.json"):
        build_extractor(name, model=tmp_path)


def test_packages_are_imported_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in Path(extractors.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"cv2", "transformers", "huggingface_hub"}, file
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"varkit\[text\]"):
        build_extractor("depth")


# ---- the table --------------------------------------------------------------------------------------------------


def test_an_unknown_name_or_option_is_refused() -> None:
    with pytest.raises(ValueError, match="canny"):
        build_extractor("cany")
    with pytest.raises(ValueError, match="sigma"):
        build_extractor("canny", sigma=1)
    with pytest.raises(ValueError, match="sigma"):
        build_extractor("map", sigma=1)


@pytest.mark.parametrize("name", ["map", None])
def test_a_map_passes_as_it_is(name: str | None) -> None:
    extractor = build_extractor(name)
    for given in (noise(2, 8, 8), noise(2, 8, 8)[..., 0]):
        assert torch.equal(extractor(given), given)
    with pytest.raises(ValueError, match="uint8"):
        extractor(torch.zeros(1, 8, 8))


@pytest.mark.parametrize("name", sorted(EXTRACTORS))
def test_each_entry_says_what_it_is(name: str) -> None:
    entry = EXTRACTORS[name]
    assert entry.meaning and entry.needs and entry.licence
