"""Images that a visitor sends: read with care, and the boxes that take them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from varkit.data.transforms import to_rgb
from varkit.demo.common import Models, need_gradio, readable_errors
from varkit.demo.controls import HIDDEN, NETWORK, RAW, gallery
from varkit.demo.files import keeping, kept

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

Upload = Mapping[str, Any]
"""What gradio hands over unprocessed for an image box: "path" is a file that it has taken in itself."""


def read_upload(upload: Upload | None, side: int, read: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """The image in a file a visitor sent (of a moving one the first), upright, RGB; see `to_rgb`.

    Args: side: pixels of the longer side, at most.   read: makes an image of the open file.
    Raises: ValueError: none, no image, or too large.
    """
    path = upload.get("path") if upload else None
    if not path:
        raise ValueError("upload an image or choose an example first")
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size  # from the header: nothing is decoded yet
            if max(width, height) <= side:
                file.load()
                return read(file)
    except Image.DecompressionBombError:
        raise ValueError(f"the image is far too large; send at most {side} a side") from None
    except (OSError, SyntaxError, EOFError, ValueError, struct.error):
        raise ValueError(f"this file is not an image that can be read; send {', '.join(FORMATS)}") from None
    raise ValueError(f"the image has {width} x {height} pixels; send at most {side} a side")


def to_model_size(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """The image at the model's (height, width), and whether it was one of ours enlarged: then exactly that one."""
    height, width = size
    k = image.width // width
    if k > 1 and image.size == (width * k, height * k):
        pixels = np.asarray(image)
        small = pixels[::k, ::k]
        if np.array_equal(small.repeat(k, 0).repeat(k, 1), pixels):
            return Image.fromarray(small), True
    return image.resize((width, height), Image.Resampling.LANCZOS), False


def opening(source: str, exact: tuple[int, int] | None) -> str:
    """Python lines that open the model and the image.   exact: (width, height), if it was enlarged from that size."""
    shrink = f".resize({exact}, Image.Resampling.NEAREST)" if exact else ""
    return (
        f"pipeline = AutoPipeline.from_pretrained({source!r})\n"
        f'image = to_rgb(Image.open("image.png")){shrink}  # the image above\n'
    )


def show_examples(models: Models, name: str, upload: Upload | None) -> tuple[Any, Any]:
    """The model's own images, and the first of them where no image was given yet."""
    with readable_errors():
        gr = need_gradio()
        images = models.examples(name)
        return gr.update(value=images, visible=bool(images)), images[0] if images and upload is None else gr.skip()


def pick_example(models: Models, name: str, index: int) -> Image.Image:
    with readable_errors():
        images = models.examples(name)
        if not 0 <= index < len(images):
            raise ValueError("choose one of the examples shown")
        return images[index]


def upload_box(prefix: str, **options: Any) -> Any:
    """An image box.   prefix: of its element's name."""
    return need_gradio().Image(
        label="Image",
        format="png",
        height=240,
        sources=["upload", "clipboard"],
        buttons=[],
        elem_id=f"{prefix}-upload",
        elem_classes="upload",
        **options,
    )


def upload_controls(prefix: str) -> tuple[Any, Any]:
    """An image box and a gallery of examples.   prefix: of their elements' names."""
    gr, upload = need_gradio(), upload_box(prefix)
    gr.Markdown("Or choose one that the model drew:", elem_classes="note")
    examples = gallery(
        "Examples", f"{prefix}-examples", 6, buttons=[], allow_preview=False, elem_classes=["pictures", "examples"]
    )
    return upload, examples


def wire_examples(models: Models, model: Any, tab: Any, upload: Any, examples: Any) -> None:
    """Fill the examples when the tab is opened or the model changes; a click on one puts it into the box."""
    gr = need_gradio()

    def on_pick(name: str, event: Any) -> str:
        return kept(pick_example(models, name, event.index), examples.GRADIO_CACHE)

    on_pick.__annotations__ = {"event": gr.SelectData}  # gradio goes by the annotation
    fill = (keeping(partial(show_examples, models), examples.GRADIO_CACHE), [model, upload], [examples, upload])
    tab.select(*fill, **RAW, **NETWORK, **HIDDEN)
    model.change(*fill, **RAW, **NETWORK, **HIDDEN)
    examples.select(on_pick, model, upload, **HIDDEN)
