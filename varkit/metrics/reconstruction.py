"""How well a tokenizer gives images back, and how it uses its codebook."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.layout import TokenLayout


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] twice -> (B,) decibels, the peak being the whole range of 2."""
    mse = (first.double() - second.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse)


class CodebookUse:
    """Counts codes per scale: how many are used at all, and the perplexity exp(entropy) of their use."""

    def __init__(self, layout: TokenLayout) -> None:
        if not isinstance(layout.codebook_size, int):
            raise ValueError(f"codebook use needs one codebook; got {layout.codebook_size}")
        self.layout, self.size = layout, layout.codebook_size
        self.counts = torch.zeros(len(layout.grids), self.size, dtype=torch.int64)

    def update(self, ids: Tensor) -> None:
        """(B, L) ids."""
        for k, part in enumerate(self.layout.split(ids)):
            self.counts[k] += torch.bincount(part.flatten().cpu(), minlength=self.size)

    def merge(self, other: CodebookUse) -> None:
        self.counts += other.counts

    @staticmethod
    def _row(counts: Tensor) -> dict[str, Any]:
        p = counts.double() / counts.sum().clamp_min(1)
        return {"used": int((counts > 0).sum()), "perplexity": float(torch.special.entr(p).sum().exp())}

    def compute(self) -> dict[str, Any]:
        total = self._row(self.counts.sum(0))
        return {
            "codebook": self.size,
            "used": total["used"],
            "used_share": total["used"] / self.size,
            "perplexity": total["perplexity"],
            "scales": [
                {"grid": "x".join(map(str, grid)), **self._row(row)}
                for grid, row in zip(self.layout.grids, self.counts, strict=True)
            ],
        }


@torch.no_grad()
def reconstruction_report(tokenizer: Any, batches: Iterable[Tensor]) -> dict[str, Any]:
    """PSNR (mean of images) and codebook use over batches (B, 3, H, W) in [-1, 1]."""
    use, total, count = CodebookUse(tokenizer.layout), 0.0, 0
    for images in batches:
        ids = tokenizer.encode(images)
        use.update(ids)
        total += float(psnr(tokenizer.decode(ids).float(), images).sum())
        count += len(images)
    return {"images": count, "psnr": total / count, **use.compute()}


def reconstruct_folder(
    name: str,
    source: str,
    out: Path,
    *,
    num: int,
    mode: str,
    split: str | None,
    root: str | None,
    device: str,
) -> dict[str, Any]:
    """What `varkit reconstruct` does: report, and write originals.png, reconstructions.png, metrics.json.

    Args: split: None is the test split of a named data set, and anything else itself.
    """
    from varkit.data.images import DATASETS, open_images
    from varkit.data.transforms import ImageTransform
    from varkit.pictures import grid, save_png, to_pil
    from varkit.pipelines.auto import best_device, open_tokenizer

    dataset = open_images(source, split=split or ("test" if source in DATASETS else "train"), root=root)
    tokenizer = open_tokenizer(name).eval()
    dataset.transform = ImageTransform(tokenizer.image_size, mode=mode, enlarge=1.0)  # type: ignore[arg-type]
    where = best_device() if device == "auto" else torch.device(device)
    tokenizer.to(where)
    num = min(num, len(dataset))
    batches = [dataset.__getitems__(list(range(i, min(i + 16, num))))["images"].to(where) for i in range(0, num, 16)]
    report = reconstruction_report(tokenizer, batches)
    shown = torch.cat(batches)[:64]
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(shown))
    save_png(grid(to_pil(shown), 8), out / "originals.png")
    save_png(grid(to_pil(back), 8), out / "reconstructions.png")
    (out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
