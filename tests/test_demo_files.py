"""What the demo serves as files, and unusual images that visitors send."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.test_demo import png, same
from varkit.demo.files import keep, keeping, kept
from varkit.demo.uploads import read_upload


def test_a_file_is_written_once_and_never_seen_half(tmp_path: Path) -> None:
    data, sizes, stop = os.urandom(200_000), set[int](), threading.Event()
    path = keep(data, "image.png", str(tmp_path))

    def look() -> None:
        while not stop.is_set():
            sizes.add(len(Path(path).read_bytes()))

    reader = threading.Thread(target=look)
    reader.start()
    number = os.stat(path).st_ino
    assert {keep(data, "image.png", str(tmp_path)) for _ in range(200)} == {path}
    stop.set()
    reader.join()
    assert sizes <= {len(data)} and os.stat(path).st_ino == number
    assert os.listdir(Path(path).parent) == ["image.png"]
    assert keep(data + b"x", "image.png", str(tmp_path)) != path


def test_an_old_file_that_is_shown_again_counts_as_new(tmp_path: Path) -> None:
    path = keep(b"x", "image.png", str(tmp_path))
    os.utime(path, (1, 1))
    keep(b"x", "image.png", str(tmp_path))
    assert os.stat(path).st_mtime > 1


def test_images_become_files_wherever_they_stand(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    value = kept(([(image, "a")], {"value": [image], "visible": True}, "text", None), str(tmp_path))
    path = value[0][0][0]
    assert value == ([(path, "a")], {"value": [path], "visible": True}, "text", None)
    assert same(Image.open(path), image)


def test_a_run_that_is_left_is_closed(tmp_path: Path) -> None:
    closed = []

    def handler(value: int) -> Iterator[int]:
        try:
            while True:
                yield value
        finally:
            closed.append(value)

    events = keeping(handler, str(tmp_path))(7)
    assert next(events) == 7
    events.close()
    assert closed == [7]
    assert keeping(lambda value: value + 1, str(tmp_path))(1) == 2


def bomb_of_text() -> bytes:
    """A PNG file whose text unpacks to 3 megabytes, three times what Pillow allows."""
    text = b"a\0\0" + zlib.compress(bytes(3_000_000), 9)
    chunk = len(text).to_bytes(4, "big") + b"zTXt" + text + zlib.crc32(b"zTXt" + text).to_bytes(4, "big")
    data = png(Image.new("RGB", (4, 4)))
    return data[:33] + chunk + data[33:]


def read(tmp_path: Path, data: bytes) -> Image.Image:
    (tmp_path / "x.png").write_bytes(data)
    return read_upload({"path": str(tmp_path / "x.png")}, 4096)


def test_text_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    data = bomb_of_text()
    assert len(data) < 10_000
    with pytest.raises(ValueError, match="not an image that can be read"):
        read(tmp_path, data)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_of_a_moving_image_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read(tmp_path, data).getcolors() == [(24, (255, 0, 0))]


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.fromarray(np.full((4, 6), 32896, np.uint16)), "PNG", (128, 128, 128)),
        (Image.new("RGBA", (6, 4), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (6, 4), (255, 0, 0, 255)), "WEBP", (255, 0, 0)),
    ],
    ids=["four inks", "16 bits", "transparent", "opaque"],
)
def test_unusual_pixels_are_read_as_they_look(
    tmp_path: Path, image: Image.Image, kind: str, colour: tuple[int, int, int]
) -> None:
    found = read(tmp_path, encoded(image, kind))
    assert found.mode == "RGB" and found.size == (6, 4)
    assert np.abs(np.asarray(found, int) - np.array(colour)).max() <= 3


def test_the_controls_fit_a_model_of_latents_too() -> None:
    """It has no logits to filter: those controls are not shown, and nothing of them is handed on."""
    from varkit import AutoPipeline
    from varkit.demo.common import check_settings, setting_updates

    pipeline = AutoPipeline.from_pretrained("fashion-xar")
    updates = setting_updates(pipeline)
    values = [update["value"] for update in updates]
    assert [update.get("visible", True) for update in updates] == [True, True, False, False, False, False]
    of_ids = setting_updates(AutoPipeline.from_pretrained("fashion-var"))
    assert [update.get("visible", True) for update in of_ids] == [True, True, True, True, True, False]
    settings = check_settings(pipeline, values)
    assert settings == {"guidance_scale": 2.0, "temperature": 1.0}
