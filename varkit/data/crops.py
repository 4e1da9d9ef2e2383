"""Crops of the guided-diffusion kind: halve with a box filter while twice too large, then bicubic, then cut.

They are what ADM, DiT, LlamaGen and their evaluations read ImageNet with. `transforms.py` holds VAR's rule.

Source: FoundationVision/LlamaGen: dataset/augmentation.py, autoregressive/train/extract_codes_c2i.py (ce98ec4),
themselves after openai/guided-diffusion.
"""

from __future__ import annotations

from PIL import Image


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """An RGB image whose shorter side is `side` pixels."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _cut(image: Image.Image, top: int, left: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square of the image, `side` pixels a side."""
    image = resize_short_side(image, side)
    return _cut(image, (image.height - side) // 2, (image.width - side) // 2, side)


def ten_crop(image: Image.Image, side: int, enlarge: float = 1.1) -> list[Image.Image]:
    """Of the middle square of int(side * enlarge) pixels: four corners (top left, top right, bottom left, bottom
    right) and the centre, then the same of the mirrored square."""
    square = center_crop(image, int(side * enlarge))
    far = square.width - side
    middle = round(far / 2)
    places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    mirrored = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [_cut(which, top, left, side) for which in (square, mirrored) for top, left in places]


def random_crop(image: Image.Image, side: int, *, short_side: int, crop_y: int, crop_x: int) -> Image.Image:
    """The square at (crop_y, crop_x) after the shorter side became `short_side` pixels.

    In training `short_side` is uniform in [side, ceil(side / 0.8)], the place uniform over what fits.
    Raises: ValueError when the square leaves the image.
    """
    image = resize_short_side(image, short_side)
    if not (0 <= crop_y <= image.height - side and 0 <= crop_x <= image.width - side):
        raise ValueError(
            f"a square of {side} at ({crop_y}, {crop_x}) leaves the image, which is {image.height}x{image.width} "
            f"when its shorter side is {short_side}"
        )
    return _cut(image, crop_y, crop_x, side)
