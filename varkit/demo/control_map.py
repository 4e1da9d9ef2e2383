"""Maps that steer: extracted from an image that a visitor sent, sent as they are, or drawn on a board of cells."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from PIL import Image, ImageOps

from varkit.conditioning.control import control_pixels
from varkit.conditioning.extractors import EXTRACTORS, Extractor, build_extractor, map_of
from varkit.demo.common import Models
from varkit.demo.painter import no_marks, read_cells, showing
from varkit.demo.uploads import Upload, read_upload
from varkit.metrics.weights import find_weights
from varkit.pictures import to_pil
from varkit.pipelines.auto import best_device

MAP, DRAWN = "map", "drawn"
TITLES = {
    "canny": "Edges of the image (Canny)",
    "hed": "Soft outlines of the image (HED)",
    "lineart": "Line drawing of the image, black on white",
    "lineart-white": "Line drawing of the image, white on black",
    MAP: "The image is a map already",
    DRAWN: "Edges drawn by hand",
}
"""Where a control comes from, for people."""
MOST_CELLS = 48


def sources() -> list[str]:
    """The keys of `TITLES` that this server can serve without fetching anything."""
    ready = []
    for name in TITLES:
        if name == "canny" and find_spec("cv2") is None:
            continue
        if name in EXTRACTORS and EXTRACTORS[name].network:
            try:
                find_weights(name.removesuffix("-white"))
            except FileNotFoundError:
                continue
        ready.append(name)
    return ready


@cache
def extractor(name: str) -> Extractor:
    """Built once."""
    return build_extractor(name, **({"device": best_device()} if EXTRACTORS[name].network else {}))


def board_grid(pipeline: Any) -> tuple[int, int]:
    """Rows and columns of the cells that are drawn on: pixels of the image, or squares of them."""
    height, width = pipeline.image_tokenizer.image_size
    k = -(-max(height, width) // MOST_CELLS)
    return -(-height // k), -(-width // k)


def board_of(pipeline: Any) -> dict[str, Any]:
    """Properties of an empty board: black."""
    grid = board_grid(pipeline)
    return {"value": no_marks(grid), **showing(Image.new("L", grid[::-1]), grid)}


def control_map(models: Models, pipeline: Any, upload: Upload | None, source: Any, marks: Any) -> Image.Image:
    """The map that steers, at the size that is drawn.

    Args: source: one of `sources()`.   marks: cells as text, see `painter`.
    Raises: ValueError on another source, no image, or nothing drawn.
    """
    if source not in sources():
        raise ValueError(f"where the control comes from must be one of {', '.join(sources())}; got {str(source)[:40]}")
    if source == DRAWN:
        cells = read_cells(marks, board_grid(pipeline), "nothing is drawn yet: drag over the board to draw edges")
        height, width = pipeline.image_tokenizer.image_size
        return Image.fromarray(cells).convert("L").resize((width, height), Image.Resampling.NEAREST)
    if source == MAP:
        image = read_upload(upload, models.limits.side, upright)
        return to_pil(control_pixels(image, size_of(pipeline, image), "the map"))[0]
    photo = read_upload(upload, models.limits.side)
    with models.turns.take():
        return map_of(extractor(source), photo, size_of(pipeline, photo))


def upright(file: Image.Image) -> Image.Image:
    """In its own mode: a palette stays one."""
    return ImageOps.exif_transpose(file)


def size_of(pipeline: Any, image: Image.Image) -> tuple[int, int]:
    """Height and width of what is drawn; see `ImagePipeline.size_for`."""
    size = pipeline.size_for(image, None, None)
    return size["height"], size["width"]
