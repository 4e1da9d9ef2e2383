"""Images -> control maps."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from varkit.conditioning.extractors import EXTRACTORS, build_extractor


def white_square(size: int = 64, inset: int = 16) -> Tensor:
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    image[:, inset:-inset, inset:-inset] = 255
    return image


# ---- Canny ------------------------------------------------------------------------------------------------------


def test_canny_of_a_square_is_its_outline() -> None:
    pytest.importorskip("cv2")
    (edges,) = build_extractor("canny")(white_square())
    assert edges.dtype == torch.uint8 and set(edges.unique().tolist()) == {0, 255}
    rows, columns = edges.nonzero(as_tuple=True)
    for axis in (rows, columns):  # a closed ring, within a pixel of the border at 16 and 48
        assert 15 <= int(axis.min()) <= 16 and 47 <= int(axis.max()) <= 48
    distance = torch.minimum(torch.minimum(rows - 16, columns - 16).abs(), torch.minimum(47 - rows, 47 - columns).abs())
    assert int(distance.max()) <= 1
    assert len(rows) >= 4 * 28


def test_canny_of_a_batch_is_that_of_each_image() -> None:
    pytest.importorskip("cv2")
    images = torch.randint(0, 256, (3, 40, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    canny = build_extractor("canny", low=50, high=120)
    together = canny(images)
    assert together.shape == (3, 40, 24)
    for image, edges in zip(images, together, strict=True):
        assert torch.equal(canny(image[None])[0], edges)


def test_canny_thresholds_count() -> None:
    """A step of 30 grey levels has a gradient of 4 * 30 = 120: beneath 200, above 100."""
    pytest.importorskip("cv2")
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
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\)"):
        build_extractor("canny")(images)


# ---- the table --------------------------------------------------------------------------------------------------


def test_an_unknown_name_or_option_is_refused() -> None:
    with pytest.raises(ValueError, match="canny"):
        build_extractor("cany")
    with pytest.raises(ValueError, match="sigma"):
        build_extractor("canny", sigma=1)


@pytest.mark.parametrize("name", sorted(EXTRACTORS))
def test_each_entry_says_what_it_is(name: str) -> None:
    entry = EXTRACTORS[name]
    assert entry.meaning and entry.needs and entry.licence
