"""What edits keep and how well they fit: shipped models, held-out images of Fashion-MNIST, the lower half redrawn.

    python benchmarks/editing.py --num 32 --out edits.png

Of each model: the PSNR of the kept half in dB, plain, pasted back, and pasted back with a feather; how much brightness
jumps at the border between both halves, as mean difference of the two rows beside it in levels of 255; and the mean
squared error of the drawn half to the real one, times 100, in the range [-1, 1]. The picture has an image a column, and
for each model rows of the given image, the edit and both kinds of pasting.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit import AutoPipeline
from varkit.heads.flow import Flow
from varkit.pictures import grid, to_pil

MODELS = ("fashion-var", "fashion-llamagen", "fashion-xar", "fashion-flowar")
SLICE = Path(__file__).parents[1] / "tests" / "data" / "fashion_slice.npz"
BORDER = 16


def images(num: int) -> tuple[Tensor, list[int]]:
    """(N, 3, 32, 32) in [-1, 1] on black, evenly over the classes, and their classes."""
    with np.load(SLICE) as file:
        rows = np.linspace(0, len(file["arr_1"]) - 1, num).round().astype(int)
        pixels, labels = file["arr_0"][rows, ..., 0], file["arr_1"][rows].tolist()
    padded = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))).float() / 127.5 - 1
    return padded[:, None].expand(-1, 3, -1, -1).contiguous(), labels


def psnr(a: Tensor, b: Tensor) -> str:
    """Of images in [-1, 1], the mean over them of the kept rows."""
    error = (a - b)[:, :, :BORDER].square().mean((1, 2, 3))
    return "exact" if not error.any() else f"{(10 * (4 / error).log10()).mean():.1f}"


def jump(x: Tensor) -> float:
    return float((x[:, :, BORDER] - x[:, :, BORDER - 1]).abs().mean() * 127.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--feather", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="flows are not shown the known latents beside theirs")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, help="a picture of the first 16")
    options = parser.parse_args()
    if options.blind:
        Flow.known = property(lambda self: None, lambda self, value: None)  # type: ignore[assignment]
    real, labels = images(options.num)
    rows: list[Image.Image] = []
    print("| model | kept, plain | pasted | feathered | jump, plain | pasted | feathered | real | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        pipe: Any = AutoPipeline.from_pretrained(name)
        pipe.set_progress_bar_config(disable=True)
        call: dict[str, Any] = {"box": (0.5, 0, 1, 1), "class_labels": labels, "output_type": "pt"}
        kinds: tuple[dict[str, Any], ...] = ({}, {"paste_back": True}, {"paste_back": True, "feather": options.feather})
        plain, pasted, soft = (pipe.edit(real, seed=options.seed, **call, **kind).images * 2 - 1 for kind in kinds)
        kept = [psnr(x, real) for x in (plain, pasted, soft)]
        jumps = [f"{jump(x):.1f}" for x in (plain, pasted, soft, real)]
        error = float((plain - real)[:, :, BORDER:].square().mean() * 100)
        print(f"| `{name}` | {' | '.join([*kept, *jumps])} | {error:.1f} |", flush=True)
        rows += [i for x in (real, plain, pasted, soft) for i in to_pil(x[:16])]
    if options.out:
        grid(rows, min(16, options.num), 2).save(options.out)


if __name__ == "__main__":
    main()
