"""The mathematics of the metrics: features in, numbers out; against loops, closed forms and each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from varkit.metrics.fid import FeatureStatistics, Gaussian, frechet_distance, spatial_features
from varkit.metrics.inception_score import inception_score
from varkit.metrics.kid import kernel_distance
from varkit.metrics.prdc import PRDC, prdc


def draws(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(count: int, dim: int, seed: int) -> Tensor:
    """Correlated features with a mean of their own."""
    return draws(count, dim, seed) @ (torch.eye(dim) + 0.3 * draws(dim, dim, seed + 100)) + 0.5 * seed


def statistics_of(features: Tensor, sizes: tuple[int, ...] = ()) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(list(sizes)) if sizes else [features]:
        statistics.update(part)
    return statistics


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(statistics_of(first), statistics_of(second))


# ---- moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize(
    "sizes", [(3, 2), (1,) * 9, (8,), (9,), (5, 0, 30), (2, 4, 1, 50, 3)], ids=lambda sizes: "+".join(map(str, sizes))
)
def test_parts_and_merged_parts_have_the_moments_of_the_whole(sizes: tuple[int, ...], offset: float) -> None:
    """With fewer samples than features, as many, and more; in one stream, in pairs, and in a chain."""
    features = mixed(sum(sizes), 8, 1) + offset
    singles = [statistics_of(part) for part in features.split(list(sizes))]
    chain = FeatureStatistics(8)
    for single in singles:
        chain.merge(single)
    backwards = statistics_of(features.split(list(sizes))[-1])
    for single in singles[-2::-1]:
        backwards.merge(single)
    covariance = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
    for ours in (statistics_of(features), statistics_of(features, sizes), chain, backwards):
        assert ours.count == len(features)
        mean, spread = ours.mean_and_covariance()
        torch.testing.assert_close(mean, features.mean(0), rtol=1e-14, atol=1e-10)
        torch.testing.assert_close(spread, covariance, rtol=1e-10, atol=1e-10)
        root = ours.gaussian().root
        torch.testing.assert_close(root.T @ root, covariance, rtol=1e-10, atol=1e-9)


def test_merging_with_itself_counts_every_sample_twice() -> None:
    for count in (4, 30):
        features = mixed(count, 8, 1)
        once = statistics_of(features)
        once.merge(once)
        expected = statistics_of(torch.cat([features, features])).mean_and_covariance()
        torch.testing.assert_close(once.mean_and_covariance(), expected, rtol=1e-10, atol=1e-10)


def test_statistics_hold_no_more_than_one_matrix_and_keep_no_reference() -> None:
    statistics, features = FeatureStatistics(6), mixed(4, 6, 1)
    expected = statistics_of(features.clone()).mean_and_covariance()
    statistics.update(features)
    features.zero_()  # a loop may fill the same buffer again
    torch.testing.assert_close(statistics.mean_and_covariance(), expected)
    for seed in range(20):
        statistics.update(mixed(5, 6, seed))
        held = itertools.chain(*(v if isinstance(v, list) else [v] for v in vars(statistics).values()))
        assert sum(v.numel() for v in held if isinstance(v, Tensor)) <= 6 * 6 + 6


@pytest.mark.parametrize("count", [5, 40])
def test_divisor_and_rounding_are_settings(count: int) -> None:
    features = mixed(count, 8, 1) + 1000
    biased = FeatureStatistics(8, ddof=0, mean_dtype=torch.float32)
    biased.update(features)
    mean, covariance = biased.mean_and_covariance()
    assert torch.equal(mean, features.mean(0).float().double()) and not torch.equal(mean, features.mean(0))
    torch.testing.assert_close(covariance * count / (count - 1), statistics_of(features).mean_and_covariance()[1])
    root = biased.gaussian().root
    torch.testing.assert_close(root.T @ root, covariance)
    coarse = FeatureStatistics(8, dtype=torch.float32)
    coarse.update(features)
    assert all(torch.equal(t, t.float().double()) for t in (coarse.mean_and_covariance()[1], coarse.gaussian().root))
    with pytest.raises(ValueError, match="ddof must be"):
        FeatureStatistics(8, ddof=2)  # type: ignore[arg-type]


def test_statistics_of_other_features_do_not_fit() -> None:
    statistics = statistics_of(mixed(9, 4, 1))
    with pytest.raises(ValueError, match="of 4 features; got 5"):
        statistics.update(mixed(9, 5, 1))
    with pytest.raises(ValueError, match="of 4 and of 5 features"):
        statistics.merge(statistics_of(mixed(9, 5, 1)))
    with pytest.raises(ValueError, match="widths 4 and 5"):
        frechet_distance(statistics, statistics_of(mixed(9, 5, 1)))
    with pytest.raises(ValueError, match="must be floats"):
        statistics.update(torch.zeros(2, 4, dtype=torch.int64))


def test_a_row_that_is_not_finite_is_named_as_counted_from_the_start_and_adds_nothing() -> None:
    features = mixed(9, 4, 1)
    statistics, bad = statistics_of(features), mixed(6, 4, 2)
    bad[1, 3], bad[5, 0] = torch.nan, -torch.inf
    before = statistics.mean_and_covariance()
    with pytest.raises(ValueError, match=r"2 of 6 rows not finite \(from 0: 10, 14\)"):
        statistics.update(bad)
    assert statistics.count == 9
    torch.testing.assert_close(statistics.mean_and_covariance(), before, rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_distance(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 samples; got {count}"):
        distance(mixed(count, 3, 1), mixed(9, 3, 2))
    with pytest.raises(ValueError, match=f"at least 2 samples; got {count}"):
        distance(mixed(9, 3, 2), mixed(count, 3, 1))


# ---- the Frechet distance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(60, 2), (90, 16), (400, 40)])
def test_the_distance_is_the_one_by_a_matrix_square_root(count: int, dim: int) -> None:
    first, second = mixed(count, dim, 1), mixed(count + 20, dim, 2)
    s1, s2 = (np.cov(f.numpy(), rowvar=False) for f in (first, second))
    expected = (first.mean(0) - second.mean(0)).square().sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert distance(first, second) == pytest.approx(float(expected), rel=1e-9)
    assert distance(first, second) == pytest.approx(distance(second, first), rel=1e-9)


def test_the_distance_of_two_gaussians_in_the_plane_is_known() -> None:
    """tr M^1/2 = (tr M + 2 det M^1/2)^1/2 for a matrix of two rows."""
    m1, m2 = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.5])
    s1, s2 = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.75], [-0.75, 4.0]])
    product = (s1 @ s2).double()
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = 4 + 0.25 + 3 + 5 - 2 * root
    assert frechet_distance(Gaussian.from_moments(m1, s1), Gaussian.from_moments(m2, s2)) == pytest.approx(expected)


def test_the_distance_of_gaussians_with_common_axes_is_known() -> None:
    """The squared differences of the means and of the deviations along each axis, some of them 0."""
    axes = torch.linalg.qr(draws(6, 6)).Q
    a, b = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0, 0.0], [1.0, 2.0, 4.0, 0.0, 0.25, 0.0]], dtype=torch.float64)
    first, second = (Gaussian.from_moments(torch.zeros(6), axes * s.square() @ axes.T) for s in (a, b))
    assert frechet_distance(first, second) == pytest.approx(float((a - b).square().sum()), rel=1e-7)


@pytest.mark.parametrize(("count", "dim"), [(2, 5), (5, 5), (6, 5), (7, 20), (80, 20), (30, 1)])
def test_equal_sets_are_at_distance_0_and_never_below(count: int, dim: int) -> None:
    features = mixed(count, dim, 1)
    scale = float(features.var(0).sum())
    for other in (features, features.flip(0), features + 1e-9):
        assert 0 <= distance(features, other) <= 1e-12 * scale
    assert distance(features, features + 2) == pytest.approx(4 * dim, rel=1e-10)


@pytest.mark.parametrize("counts", [(30, 40), (200, 300), (40, 300)], ids=["few, few", "many, many", "few, many"])
def test_a_distance_in_a_subspace_is_that_in_the_whole_space(counts: tuple[int, int]) -> None:
    """Six dimensions turned into fifty: the covariances are singular and the distance must not move."""
    first, second = mixed(counts[0], 6, 1), mixed(counts[1], 6, 2)
    turn = torch.linalg.qr(draws(50, 6, 3)).Q.T
    assert distance(first @ turn, second @ turn) == pytest.approx(distance(first, second), rel=1e-11)
    stored = [Gaussian.from_moments(*statistics_of(f @ turn).mean_and_covariance()) for f in (first, second)]
    assert not any(g.full_rank for g in stored)
    assert frechet_distance(*stored) == pytest.approx(distance(first, second), rel=1e-7)


def test_fewer_samples_than_features_agree_with_the_form_of_full_matrices() -> None:
    first, second = mixed(20, 32, 1), mixed(25, 32, 2)
    (m1, s1), (m2, s2) = (statistics_of(f).mean_and_covariance() for f in (first, second))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert distance(first, second) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.ones(2, 3), "a covariance"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), r"covariance: 1 of 2 rows not finite \(from 0: 0\)"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalues, down to -1"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian.from_moments(torch.zeros(2), covariance)


def test_spatial_features_are_in_the_order_row_column_channel() -> None:
    activations = torch.arange(2 * 5 * 3 * 4).view(2, 5, 3, 4).float()
    features = spatial_features(activations, channels=2)
    for n, y, x, c in itertools.product(range(2), range(3), range(4), range(2)):
        assert features[n, (y * 4 + x) * 2 + c] == activations[n, c, y, x]
    assert torch.equal(spatial_features(activations, 2, "nchw"), activations[:, :2].reshape(2, -1))
    with pytest.raises(ValueError, match="C >= 7"):
        spatial_features(activations)


# ---- the inception score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_the_score_lies_between_1_and_the_number_of_classes(scale: float, dtype: torch.dtype) -> None:
    score = inception_score(draws(200, 12) * scale, splits=4, dtype=dtype)
    assert 1 <= score.mean <= 12 * (1 + 1e-6) and score.std >= 0
    if scale == 0:
        assert score.mean == pytest.approx(1, abs=1e-6) and score.std == pytest.approx(0, abs=1e-6)


def test_the_score_by_its_definition() -> None:
    logits = draws(50, 7)
    p = logits.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(logits, splits=1).mean == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits, splits=1, eps=1e-16).mean == pytest.approx(expected, rel=1e-12)
    parts = [inception_score(part, splits=1).mean for part in logits.split(20)]
    blocks = inception_score(logits, splits=None, split_size=20, shuffle=None)  # 20, 20 and 10
    assert blocks == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)


def test_a_set_stored_class_by_class_scores_low_in_blocks_unless_shuffled() -> None:
    certain = torch.eye(10).repeat_interleave(20, 0) * 1000  # 20 images of class 0, then 20 of class 1, ...
    cycled = certain.view(10, 20, 10).transpose(0, 1).flatten(0, 1)
    in_blocks = {"splits": None, "split_size": 20, "shuffle": None}
    assert inception_score(certain, **in_blocks).mean == pytest.approx(1)  # type: ignore[arg-type]
    assert inception_score(cycled, **in_blocks).mean == pytest.approx(10)  # type: ignore[arg-type]
    assert 4 < inception_score(certain, shuffle=2020).mean < 10
    assert inception_score(certain, shuffle=1) == inception_score(certain, shuffle=1)
    assert inception_score(certain, shuffle=1) != inception_score(certain, shuffle=2)
    assert inception_score(certain, splits=1, shuffle=1).mean == pytest.approx(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": 6}, "6 splits need at least 6 samples; got 5"),
        ({"splits": 2, "split_size": 2}, "splits or split_size"),
        ({"splits": None}, "splits or split_size"),
        ({"splits": 0}, "splits or split_size"),
    ],
)
def test_a_set_that_cannot_be_cut_so_is_refused(settings: dict[str, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(draws(5, 3), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 samples; got 0"):
        inception_score(draws(0, 3), splits=None, split_size=5)


# ---- the kernel distance --------------------------------------------------------------------------------------


def mmd_by_loops(
    x: Tensor, y: Tensor, unbiased: bool, degree: int = 3, gamma: float = 0.2, coef0: float = 1.0
) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (gamma * float(a @ b) + coef0) ** degree

    total = 0.0
    for rows in (x, y):
        n = len(rows)
        pairs = [kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if not unbiased or i != j]
        total += sum(pairs) / len(pairs)
    return total - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_kernel_distance_of_whole_sets_is_that_of_a_double_loop(estimator: str, block: int) -> None:
    x, y = mixed(17, 5, 1), mixed(23, 5, 2)
    expected = mmd_by_loops(x, y, estimator == "unbiased")
    ours = kernel_distance(x, y, subsets=None, estimator=estimator, block=block)  # type: ignore[arg-type]
    assert ours == pytest.approx((expected, 0), rel=1e-10)
    expected = mmd_by_loops(x, y, estimator == "unbiased", degree=2, gamma=0.5, coef0=0.1)
    settings = {"degree": 2, "gamma": 0.5, "coef0": 0.1, "estimator": estimator}
    assert kernel_distance(x, y, subsets=None, **settings).mean == pytest.approx(expected, rel=1e-10)  # type: ignore[arg-type]


def test_the_kernel_distance_is_the_mean_over_seeded_subsets() -> None:
    x, y = mixed(40, 5, 1), mixed(50, 5, 2)
    stream = np.random.RandomState(3)
    values = []
    for _ in range(4):
        a, b = stream.choice(40, 10, replace=False), stream.choice(50, 10, replace=False)
        values.append(mmd_by_loops(x[a], y[b], unbiased=True))
    settings = {"subsets": 4, "subset_size": 10}
    assert kernel_distance(x, y, seed=3, **settings) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    assert kernel_distance(x, y, seed=4, **settings) != kernel_distance(x, y, seed=3, **settings)


def test_the_unbiased_kernel_distance_is_0_on_average_and_below_it_for_equal_sets() -> None:
    """The mean over 200 pairs of sets of one law, within five of its standard errors."""
    values = [kernel_distance(draws(12, 4, s), draws(15, 4, 1000 + s), subsets=None).mean for s in range(200)]
    assert abs(np.mean(values)) < 5 * np.std(values) / math.sqrt(200)
    assert min(values) < 0 < max(values)
    assert kernel_distance(draws(12, 4), draws(12, 4), subsets=None).mean < 0
    assert kernel_distance(draws(12, 4), draws(12, 4), subsets=None, estimator="biased").mean == pytest.approx(0)


def test_a_subset_is_not_made_smaller_in_silence() -> None:
    with pytest.raises(ValueError, match="second features: needs at least 20 samples; got 19"):
        kernel_distance(draws(20, 4), draws(19, 4), subset_size=20)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        kernel_distance(draws(1, 4), draws(19, 4), subsets=None)
    with pytest.raises(ValueError, match="estimator must be"):
        kernel_distance(draws(9, 4), draws(9, 4), subsets=None, estimator="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="subsets must be"):
        kernel_distance(draws(9, 4), draws(9, 4), subsets=0)


# ---- precision, recall, density, coverage ---------------------------------------------------------------------


def prdc_by_loops(real: Tensor, fake: Tensor, k: int, strict: bool) -> PRDC:
    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum())

    def inside(a: float, radius: float) -> bool:
        return a < radius if strict else a <= radius

    def reach(rows: Tensor) -> list[float]:
        n = range(len(rows))
        return [sorted(apart(rows[i], rows[j]) for j in n if j != i)[k - 1] for i in n]

    around_real, around_fake = reach(real), reach(fake)
    balls = [[inside(apart(r, f), radius) for f in fake] for r, radius in zip(real, around_real, strict=True)]
    recalled = [any(inside(apart(r, f), radius) for f, radius in zip(fake, around_fake, strict=True)) for r in real]
    return PRDC(
        precision=float(np.mean(np.any(balls, 0))),
        recall=float(np.mean(recalled)),
        density=float(np.sum(balls)) / (k * len(fake)),
        coverage=float(np.mean(np.any(balls, 1))),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("comparison", ["strict", "inclusive"])
@pytest.mark.parametrize("kind", ["plain", "grid", "repeated"])
def test_prdc_is_that_of_loops_at_any_block_size(kind: str, comparison: str, k: int) -> None:
    """On a grid many distances tie; with rows repeated radii are 0 and a strict ball is empty."""
    real, fake = draws(30, 4, 1), draws(37, 4, 2) * 1.2 + 0.3
    if kind != "plain":
        real, fake = real.round(), fake.round()
    if kind == "repeated":
        real, fake = real[:10].repeat(3, 1), torch.cat([fake[:15], real[:5], fake[:15]])
    expected = prdc_by_loops(real, fake, k, comparison == "strict")
    for distance_kind, block in (("euclidean", 1000), ("squared_euclidean", 7), ("squared_euclidean", 1)):
        for dtype in (torch.float32, torch.float64):
            ours = prdc(
                real,
                fake,
                k=k,
                comparison=comparison,  # type: ignore[arg-type]
                distance=distance_kind,  # type: ignore[arg-type]
                dtype=dtype,
                block=block,
            )
            assert ours == pytest.approx(expected, abs=1e-12), (distance_kind, block, dtype)


def test_precision_and_recall_change_places_with_the_sets_and_ignore_an_offset() -> None:
    real, fake = draws(60, 8, 1), draws(50, 8, 2) * 1.5
    ours = prdc(real, fake)
    assert 0 < ours.precision < ours.recall < 1
    assert prdc(fake, real)[:2] == (ours.recall, ours.precision)
    assert prdc(real + 4096, fake + 4096) == ours  # float32 products of such numbers hold no distances
    assert prdc(real, real)[:2] == (1, 1)
    assert prdc(real, fake + 100) == (0, 0, 0, 0)


def test_prdc_refuses_what_it_cannot_answer() -> None:
    for real, fake, name in ((draws(3, 2), draws(9, 2), "real"), (draws(9, 2), draws(3, 2), "generated")):
        with pytest.raises(ValueError, match=f"{name} features: needs at least 4 samples; got 3"):
            prdc(real, fake, k=3)
    assert 0 <= prdc(draws(4, 2), draws(4, 2, 1), k=3).recall <= 1
    for settings in ({"k": 0}, {"comparison": "about"}, {"distance": "manhattan"}):
        with pytest.raises(ValueError, match="must be"):
            prdc(draws(9, 2), draws(9, 2), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="widths 2 and 3"):
        prdc(draws(9, 2), draws(9, 3))


# ---- all of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "metric",
    [
        lambda good, bad: distance(good, bad),
        lambda good, bad: kernel_distance(good, bad, subsets=None),
        lambda good, bad: prdc(good, bad),
        lambda good, bad: prdc(bad, good),
        lambda good, bad: inception_score(bad, splits=2),
    ],
    ids=["frechet", "kernel", "prdc, generated", "prdc, real", "inception score"],
)
def test_rows_that_are_not_finite_are_named(metric: Callable[[Tensor, Tensor], object], value: float) -> None:
    good, bad = draws(30, 4), draws(30, 4)
    bad[11, 2] = value
    with pytest.raises(ValueError, match=r"1 of 30 rows not finite \(from 0: 11\)"):
        metric(good, bad)
    bad[:] = value
    with pytest.raises(ValueError, match=r"30 of 30 rows not finite \(from 0: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        metric(good, bad)
