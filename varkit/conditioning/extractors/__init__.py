"""Images -> control maps, by name: `build_extractor("canny")(images)`.

Maps are what ControlAR's released models were trained with; each entry of `EXTRACTORS` says what its map means, what it
needs and under which licence. Nothing is downloaded at import, and packages are imported when an extractor is built.
"""

from __future__ import annotations

from typing import Any

from varkit.conditioning.extractors.base import Extractor, ExtractorEntry
from varkit.conditioning.extractors.canny import Canny
from varkit.config import nearest

__all__ = ["EXTRACTORS", "Extractor", "ExtractorEntry", "build_extractor", "extractor_entry"]

EXTRACTORS: dict[str, ExtractorEntry] = {
    "canny": ExtractorEntry(
        Canny,
        channels=1,
        meaning="edges: 255 on an edge, 0 elsewhere",
        resize="nearest",
        needs="the extra `control` (opencv-python-headless)",
        licence="Apache-2.0 (OpenCV)",
    ),
}


def extractor_entry(name: str) -> ExtractorEntry:
    """Raises: ValueError naming the nearest extractor when `name` is none."""
    if name not in EXTRACTORS:
        raise ValueError(
            f"no extractor is called {name!r}{nearest(name, EXTRACTORS)}; there are {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[name]


def build_extractor(name: str, **options: Any) -> Extractor:
    """An extractor that is ready to use: uint8 (B, H, W, 3) -> uint8 (B, H, W), or (B, H, W, 3) for colours.

    Raises: ValueError for an unknown name or option; ImportError or FileNotFoundError saying what is missing.
    """
    entry = extractor_entry(name)
    try:
        return entry.build(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"extractor {name!r}: {str(error).split('() ')[-1]}") from None
