"""How much one visitor may ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Options of `varkit demo`; what exceeds one is refused before any work.

    images: of one request.   evaluated: images of one evaluation.   waiting: requests in the queue, of all visitors.
    upload_mb: megabytes of one file.   side: pixels of the longer side of an uploaded image or clip.
    frames: of a clip that is drawn (those that its model draws at once are always allowed), or of one that is sent to
        be continued at its end.   seconds: of a clip that is sent.
    Raises: ValueError for one below 1, or an evaluation of fewer than 16 images.
    """

    images: int = 16
    evaluated: int = 256
    waiting: int = 200
    upload_mb: int = 10
    side: int = 4096
    frames: int = 128
    seconds: int = 60

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 16 if field.name == "evaluated" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"the limit {field.name} must be at least {least}; got {getattr(self, field.name)}")
