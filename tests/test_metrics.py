"""Metrics against second implementations, closed forms and counts by hand; pictures pixel by pixel."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from tests.test_models import liven, tiny_pair
from varkit.data import ImageTransform, open_images
from varkit.data.images import ImageDataset
from varkit.layout import TokenLayout
from varkit.metrics.classifier import ImageClassifier
from varkit.metrics.fid import FeatureStatistics, frechet_distance
from varkit.metrics.lpips import LPIPS, find_lpips
from varkit.metrics.reconstruction import CodebookUse, psnr, reconstruct_folder, reconstruction_report
from varkit.pictures import columns_for, grid, read_settings, save_npz, save_png, to_pil

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"
SIDE = 8  # of the tiny tokenizer's images


def statistics_of(features: Tensor, parts: int = 1) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for part in features.chunk(parts):
        result.update(part)
    return result


def images(count: int = 4, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def data() -> ImageDataset:
    return open_images(SLICE, transform=ImageTransform(SIDE, "squash"))


# ---- the Frechet distance -------------------------------------------------------------------------------------


def correlated(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return draw @ torch.randn(dim, dim, generator=generator, dtype=torch.float64) + seed


def textbook_distance(first: Tensor, second: Tensor) -> float:
    m1, m2 = (f.mean(0).numpy() for f in (first, second))
    s1, s2 = (np.cov(f.numpy(), rowvar=False) for f in (first, second))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))


def exact_normal(count: int, mean: list[float], deviation: list[float]) -> Tensor:
    """Features whose sample mean and covariance are these, the covariance diagonal, to rounding."""
    draw = torch.randn(count, len(mean), dtype=torch.float64)
    draw = torch.linalg.qr(draw - draw.mean(0)).Q * math.sqrt(count - 1)
    return draw * torch.tensor(deviation, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


@pytest.mark.parametrize(("count", "dim"), [(50, 1), (40, 7), (300, 24)])
def test_frechet_distance_is_that_of_a_matrix_square_root(count: int, dim: int) -> None:
    first, second = correlated(count, dim, 1), correlated(count + 9, dim, 2)
    if dim > 1:
        expected = textbook_distance(first, second)
        assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-6)
    else:
        expected = (first.mean() - second.mean()).item() ** 2 + (first.std() - second.std()).item() ** 2
        assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_is_known() -> None:
    """The sum of squared differences of means and of standard deviations."""
    first = exact_normal(30, [0, 1, -2], [1, 2, 0.5])
    second = exact_normal(45, [1, 1, 0], [3, 2, 0.25])
    expected = (1 + 0 + 4) + (4 + 0 + 0.0625)
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-9)
    shifted = frechet_distance(statistics_of(first), statistics_of(first + 2))
    assert shifted == pytest.approx(3 * 4, rel=1e-9)


@pytest.mark.parametrize("count", [6, 200], ids=["fewer samples than features", "more"])
def test_frechet_distance_is_a_distance(count: int) -> None:
    first, second = correlated(count, 16, 1), correlated(count, 16, 2)
    a, b = statistics_of(first), statistics_of(second)
    scale = a.mean_and_covariance()[1].trace().item()
    assert abs(frechet_distance(a, a)) < 1e-6 * scale
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6) and frechet_distance(a, b) > 1
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    turned = frechet_distance(statistics_of(first @ turn), statistics_of(second @ turn))
    assert turned == pytest.approx(frechet_distance(a, b), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_in_parts_and_merged_are_those_of_the_whole(offset: float) -> None:
    features = correlated(60, 5, 3) + offset
    whole, parts = statistics_of(features), statistics_of(features, parts=7)
    merged = statistics_of(features[:20])
    merged.merge(statistics_of(features[20:]))
    mean, covariance = whole.mean_and_covariance()
    np.testing.assert_allclose(mean.numpy(), features.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-6, atol=1e-6)
    for other in (parts, merged):
        assert other.count == 60
        for ours, theirs in zip(other.mean_and_covariance(), (mean, covariance), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        statistics_of(torch.zeros(1, 3)).mean_and_covariance()


# ---- the classifier -------------------------------------------------------------------------------------------


def tiny_classifier(num_classes: int = 10) -> ImageClassifier:
    torch.manual_seed(0)
    return liven(ImageClassifier(num_classes, SIDE, (8, 16)), 0.3)


def test_the_classifier_judges_each_image_by_itself() -> None:
    model, x = tiny_classifier(), images(6)
    with torch.no_grad():
        features, logits = model.features(x), model(x)
        assert features.shape == (6, 16) and logits.shape == (6, 10)
        torch.testing.assert_close(model.head(features), logits)  # no dropout when judging
        torch.testing.assert_close(model(x[[4, 1]]), logits[[4, 1]], atol=1e-5, rtol=1e-5)
    for bad in (images(2, 16), images(2)[:, :1], images(2)[0]):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 8, 8\) in \[-1, 1\]; got"):
            model(bad)


# ---- reconstruction -------------------------------------------------------------------------------------------


def test_psnr_by_value() -> None:
    black = -torch.ones(3, 3, 4, 4)
    other = black.clone()
    other[0] = 1  # as wrong as can be: the whole range
    other[1] += 0.2  # a tenth of the range
    other[2, 0, 0, 0] = 1  # one value of 48
    assert psnr(black, other).tolist() == pytest.approx([0, 20, 10 * math.log10(48)])
    assert torch.equal(psnr(black, other), psnr(other, black))
    assert psnr(black, black).tolist() == [math.inf] * 3


def test_codebook_use_by_hand() -> None:
    layout = TokenLayout(((1, 1), (1, 2)), 5, 2)
    ids = torch.tensor([[0, 1, 1], [0, 2, 3]])
    use = CodebookUse(layout)
    use.update(ids)
    result = use.compute()
    assert (result["codebook"], result["used"], result["used_share"]) == (5, 4, 0.8)
    entropy = -2 * (2 / 6 * math.log(2 / 6)) - 2 * (1 / 6 * math.log(1 / 6))
    assert result["perplexity"] == pytest.approx(math.exp(entropy))
    assert [(s["grid"], s["used"]) for s in result["scales"]] == [("1x1", 1), ("1x2", 3)]
    assert [s["perplexity"] for s in result["scales"]] == pytest.approx([1, 2**1.5])
    one, two = CodebookUse(layout), CodebookUse(layout)
    one.update(ids[:1])
    two.update(ids[1:])
    one.merge(two)
    assert one.compute() == result
    with pytest.raises(ValueError, match="needs one codebook; got None"):
        CodebookUse(TokenLayout(((2, 2),), None, 4))


def test_the_report_is_the_mean_over_images_however_they_are_batched() -> None:
    _, tokenizer = tiny_pair("var_fashion")
    x = images(10)
    with torch.no_grad():
        ids = tokenizer.encode(x)
        expected = psnr(tokenizer.decode(ids), x).mean().item()
    whole, parts = (reconstruction_report(tokenizer, x.split(n)) for n in (10, 3))
    assert whole["images"] == parts["images"] == 10
    assert whole["psnr"] == pytest.approx(expected) and parts["psnr"] == pytest.approx(expected, rel=1e-4)
    assert whole["used"] == len(ids.unique())
    assert [s["grid"] for s in whole["scales"]] == ["1x1", "2x2", "4x4"]


def test_reconstructing_a_set_writes_both_sheets_and_the_numbers(tmp_path: Path) -> None:
    _, tokenizer = tiny_pair("var_fashion")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    report = reconstruct_folder(
        str(tmp_path / "model"), str(SLICE), out, num=20, mode="squash", split="train", root=None, device="cpu"
    )
    assert report["images"] == 20 and json.loads((out / "metrics.json").read_text()) == report
    assert {p.name for p in out.iterdir()} == {"originals.png", "reconstructions.png", "metrics.json"}
    x = data().__getitems__(list(range(20)))["images"]
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(x))
    for name, expected in (("originals.png", x), ("reconstructions.png", back)):
        with Image.open(out / name) as sheet:
            difference = np.asarray(sheet, dtype=int) - np.asarray(grid(to_pil(expected), 8), dtype=int)
        assert abs(difference).max() <= 1


# ---- LPIPS ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeeze() -> LPIPS:
    """The smallest of the three, with random weights: the formula does not depend on them."""
    torch.manual_seed(0)
    model = LPIPS("squeeze")
    for head in model.heads:
        head.data.uniform_(0, 1)
    return model


def trunk_file_state(model: LPIPS) -> dict[str, Tensor]:
    """Its trunk as torchvision's file has it."""
    return {f"features.{key}": value for part in model.slices for key, value in part.state_dict().items()}


def head_file_state(model: LPIPS) -> dict[str, Tensor]:
    """Its heads as the official file has them."""
    return {f"lin{i}.model.1.weight": head.detach().view(1, -1, 1, 1) for i, head in enumerate(model.heads)}


def test_lpips_by_the_formula_of_the_paper(squeeze: LPIPS) -> None:
    """Equation 1: unit-normalised features, squared differences, weighted by channel, averaged over positions."""
    import torchvision

    network = torchvision.models.squeezenet1_1(weights=None)
    missing, unexpected = network.load_state_dict(trunk_file_state(squeeze), strict=False)
    assert not unexpected and all(name.startswith("classifier") for name in missing)
    x, y = images(2, 48), images(2, 48, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((image - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for image in (x, y))
    expected, heads = torch.zeros(2), iter(squeeze.heads)
    with torch.no_grad():
        for i, layer in enumerate(network.features):
            a, b = layer(a), layer(b)
            if i in (1, 4, 7, 9, 10, 11, 12):
                difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
                expected += (difference * next(heads).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    assert next(heads, None) is None
    torch.testing.assert_close(squeeze(x, y), expected, rtol=1e-4, atol=1e-6)


def test_lpips_is_a_distance_of_each_pair_by_itself(squeeze: LPIPS) -> None:
    x, y = images(3, 48), images(3, 48, seed=1)
    distance = squeeze(x, y)
    assert distance.shape == (3,) and (distance > 0).all()
    assert torch.equal(squeeze(x, x), torch.zeros(3))
    torch.testing.assert_close(squeeze(y, x), distance)
    torch.testing.assert_close(squeeze(x[1:2], y[1:2]), distance[1:2], rtol=1e-4, atol=1e-6)
    near = squeeze(x, (x + 0.05 * y).clamp(-1, 1))
    assert (near < distance).all()
    assert not squeeze.training and not any(p.requires_grad for p in squeeze.parameters())


@pytest.mark.parametrize("case", ["equal", "constant", "no feature at all"])
def test_the_gradient_of_lpips_is_always_finite(squeeze: LPIPS, case: str) -> None:
    model = LPIPS("squeeze")
    model.load(trunk_file_state(squeeze), head_file_state(squeeze))
    x, y = images(2, 48), images(2, 48, seed=1)
    if case == "equal":
        y = x.clone()
    elif case == "constant":
        x, y = torch.zeros_like(x), torch.ones_like(y)
    else:
        model.slices[0][0].weight.zero_()
        model.slices[0][0].bias.zero_()
    x.requires_grad_()
    loss = model(x, y).sum()
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert (x.grad != 0).any() == (case == "constant")


def test_lpips_opens_the_two_released_files_from_a_folder(squeeze: LPIPS, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"LPIPS\(squeeze\) needs squeezenet1_1-b8a52dc0.pth, which is not in"):
        find_lpips(str(tmp_path), "squeeze")
    trunk = trunk_file_state(squeeze) | {"classifier.1.bias": torch.zeros(1000)}
    torch.save(trunk, tmp_path / "squeezenet1_1-b8a52dc0.pth")
    torch.save(head_file_state(squeeze), tmp_path / "squeeze.pth")
    model = find_lpips(str(tmp_path), "squeeze")
    assert model is not None
    x, y = images(2, 48), images(2, 48, seed=1)
    assert torch.equal(model(x, y), squeeze(x, y))


def test_lpips_refuses_what_it_does_not_know(squeeze: LPIPS) -> None:
    assert find_lpips("none") is None
    with pytest.raises(ValueError, match="trunk must be one of alex, vgg, squeeze; got 'resnet'"):
        LPIPS("resnet")  # type: ignore[arg-type]
    model, heads, trunk = LPIPS("squeeze"), head_file_state(squeeze), trunk_file_state(squeeze)
    with pytest.raises(ValueError, match=r"missing in the file: heads.6"):
        model.load(trunk, {k: v for k, v in heads.items() if "lin6" not in k})
    with pytest.raises(ValueError, match=r"missing in the file: slices.0.0.weight"):
        model.load({k: v for k, v in trunk.items() if k != "features.0.weight"}, heads)
    with pytest.raises(ValueError, match=r"other shapes: slices.0.0.weight: file \(3, 3\)"):
        model.load(trunk | {"features.0.weight": torch.zeros(3, 3)}, heads)


# ---- pictures -------------------------------------------------------------------------------------------------


def test_images_become_bytes_by_rounding_and_clamping() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1 / 127.5 * 0.4, 1.0, 7.0]).view(1, 1, 1, 7).expand(2, 3, 1, 7)
    pictures = to_pil(x)
    assert [p.size for p in pictures] == [(7, 1)] * 2 and pictures[0].mode == "RGB"
    assert np.asarray(pictures[1])[0, :, 0].tolist() == [0, 0, 64, 128, 128, 255, 255]
    ramp = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    assert np.asarray(to_pil(ramp)[0])[..., 2].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("zoom", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (6, 3), (7, 3), (2, 5)])
def test_a_grid_shows_every_image_in_its_place(count: int, columns: int, zoom: int) -> None:
    pictures = to_pil(torch.rand(count, 3, 4, 5) * 1.6 - 1)  # never white
    sheet = np.asarray(grid(pictures, columns, zoom)).copy()
    rows = math.ceil(count / columns)
    assert sheet.shape == (rows * (4 * zoom + 2) + 2, columns * (5 * zoom + 2) + 2, 3)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (4 * zoom + 2), 2 + i % columns * (5 * zoom + 2)
        place = sheet[top : top + 4 * zoom, left : left + 5 * zoom]
        assert (place == np.asarray(picture).repeat(zoom, 0).repeat(zoom, 1)).all()
        place[:] = 255
    assert (sheet == 255).all()  # nothing but paper between them


def test_columns_fit_the_classes_or_make_about_a_square() -> None:
    assert columns_for(50, 10) == 10 and columns_for(10, 10) == 10
    assert columns_for(9, 10) == 3  # not one row of every class
    assert columns_for(1, 1000) == 1 and columns_for(16, 1) == 4 and columns_for(4000, 1000) == 16
    for num in range(1, 300):
        for classes in (0, 1, 2, 10, 16, 17, 1000):
            assert 1 <= columns_for(num, classes) <= min(num, 16)


def test_a_png_carries_its_settings(tmp_path: Path) -> None:
    picture, path = to_pil(images(1))[0], tmp_path / "deep" / "a.png"
    settings = {"seed": 3, "class": "Ankle boot — été", "guidance": [1.5, None], "nested": {"top_p": 0.9}}
    save_png(picture, path, settings)
    assert read_settings(path) == settings
    with Image.open(path) as again:
        assert (np.asarray(again) == np.asarray(picture)).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    save_png(picture, path)
    with pytest.raises(ValueError, match=r"a.png carries no varkit settings"):
        read_settings(path)
    picture.save(tmp_path / "foreign.bmp")
    with pytest.raises(ValueError, match="carries no varkit settings"):
        read_settings(tmp_path / "foreign.bmp")


def test_an_npz_has_the_layout_of_the_adm_evaluator(tmp_path: Path) -> None:
    pictures, path = to_pil(images(5)), tmp_path / "deep" / "samples.npz"
    save_npz(pictures, [3, 1, 4, 1, 5], path)
    with np.load(path) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (5, SIDE, SIDE, 3)
        assert (arrays["arr_0"][2] == np.asarray(pictures[2])).all()
        assert arrays["arr_1"].tolist() == [3, 1, 4, 1, 5]
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]
    again = open_images(path)  # and varkit reads it back
    assert len(again) == 5 and again.labels.tolist() == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda path: save_png(Image.new("CMYK", (2, 2)), path)),  # PNG knows no CMYK
        ("a.npz", lambda path: save_npz([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))], [0, 0], path)),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises((OSError, ValueError)):
        write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
