"""Intervals: what an image contributes to a score, against what the score does when the images are drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from varkit.metrics.fid import FeatureStatistics, Gaussian, frechet_contributions, frechet_distance
from varkit.metrics.inception_score import inception_score_with_contributions
from varkit.metrics.interval import bootstrap_interval, standard_error
from varkit.metrics.kid import kernel_contributions, kernel_distance

DRAWS = 120


def reference(dim: int, seed: int = 0) -> tuple[Tensor, Gaussian]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(4000, dim, generator=g, dtype=torch.float64) @ torch.randn(dim, dim, generator=g).double()
    statistics = FeatureStatistics(dim)
    statistics.update(rows)
    return rows, statistics.gaussian()


def distance(rows: Tensor, second: Gaussian) -> float:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return frechet_distance(statistics, second)


def drawn(count: int, dim: int) -> Callable[[int], Tensor]:
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).double()

    def draw(seed: int) -> Tensor:
        return torch.randn(count, dim, generator=torch.Generator().manual_seed(100 + seed)).double() @ mixing + 0.3

    return draw


@pytest.mark.parametrize(("count", "dim"), [(1000, 8), (200, 8), (60, 32), (30, 32)])
def test_contributions_foretell_how_a_distance_scatters(count: int, dim: int) -> None:
    """Over sets drawn anew; with more samples than dimensions and with fewer."""
    _, second = reference(dim)
    draw = drawn(count, dim)
    values = torch.tensor([distance(draw(i), second) for i in range(DRAWS)])
    foretold = torch.tensor([standard_error(frechet_contributions(draw(i), second)) for i in range(DRAWS)]).mean()
    assert float(foretold) == pytest.approx(float(values.std()), rel=0.3)


def test_contributions_are_the_slope_of_the_distance() -> None:
    """Leaving one sample out changes the distance as its contribution says, to first order."""
    count, (_, second) = 400, reference(24)
    rows = drawn(count, 24)(0)
    contributions = frechet_contributions(rows, second, ddof=0)
    whole = FeatureStatistics(24, ddof=0)
    whole.update(rows)
    value = frechet_distance(whole, second)
    changes = []
    for i in range(10):
        without = FeatureStatistics(24, ddof=0)
        without.update(torch.cat([rows[:i], rows[i + 1 :]]))
        changes.append((value - frechet_distance(without, second)) * (count - 1))
    found = torch.tensor(changes, dtype=torch.float64)
    centred = found - found.mean(), contributions[:10] - contributions[:10].mean()
    assert float(torch.corrcoef(torch.stack(centred))[0, 1]) > 0.97


def test_contributions_to_the_kernel_distance_foretell_its_scatter() -> None:
    real, _ = reference(8)
    draw = drawn(150, 8)
    values = torch.tensor([kernel_distance(draw(i), real[:500], subsets=None).mean for i in range(DRAWS)])
    foretold = torch.tensor([standard_error(kernel_contributions(draw(i), real[:500])) for i in range(DRAWS)]).mean()
    assert float(foretold) == pytest.approx(float(values.std()), rel=0.3)


def test_contributions_to_the_inception_score_foretell_its_scatter() -> None:
    def scored(seed: int) -> tuple[float, float]:
        logits = 2 * torch.randn(300, 10, generator=torch.Generator().manual_seed(seed))
        options = {"splits": 3, "split_size": None, "shuffle": 0, "dtype": torch.float64, "eps": 0.0}
        score, contributions = inception_score_with_contributions(logits, **options)  # type: ignore[arg-type]
        return score.mean, standard_error(contributions)

    both = torch.tensor([scored(i) for i in range(DRAWS)])
    assert float(both[:, 1].mean()) == pytest.approx(float(both[:, 0].std()), rel=0.3)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Means of 60 numbers: the true mean lies in about 90 of 100 intervals of level 0.9."""
    inside = 0
    for seed in range(300):
        values = torch.randn(60, generator=torch.Generator().manual_seed(seed)).double()
        low, high = bootstrap_interval(float(values.mean()), values, level=0.9, resamples=200, seed=seed)
        inside += low <= 0 <= high
    assert 0.84 < inside / 300 < 0.94


def test_an_interval_holds_its_value_and_narrows_with_the_images() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    few, many = (bootstrap_interval(0.5, values[:n]) for n in (40, 4000))
    assert few.low < 0.5 < few.high
    assert few.high - few.low > 5 * (many.high - many.low)
    assert bootstrap_interval(0.5, values[:40], count=4000).high < few.high  # as of more images


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = torch.randn(50).double()
    assert bootstrap_interval(1.0, values, seed=3) == bootstrap_interval(1.0, values, seed=3)
    assert bootstrap_interval(1.0, values, seed=3) == pytest.approx(bootstrap_interval(1.0, values + 7, seed=3))
    assert bootstrap_interval(1.0, values, seed=3) != bootstrap_interval(1.0, values, seed=4)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([1.0, torch.nan]), torch.zeros(2, 2)])
def test_contributions_that_are_none_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="one an image"):
        bootstrap_interval(0.0, bad)


@pytest.mark.parametrize("change", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_an_impossible_interval_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(0.0, torch.zeros(3), **change)  # type: ignore[arg-type]
