"""Classes of pixels, as colours, by a segmentation network of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from varkit.conditioning.extractors.base import checked_images
from varkit.conditioning.extractors.hugging_face import open_transformers
from varkit.conditioning.extractors.palettes import PALETTES, palette_colours

MASK2FORMER_ADE20K = "facebook/mask2former-swin-large-ade-semantic"
IDS = "ids"


class Segmentation:
    """Each pixel has the colour of its class.

    Args:
        model: a semantic or universal segmentation network of transformers: hub name or folder.
        palette: whose colours: ade20k (150 classes), coco-stuff (171), or `ids`: the class itself, from 0, as a grey
            level. Some classes of both palettes share a colour, so only ids can be compared.
        device: where it runs.
    Raises: ValueError for another palette, or a network of another number of classes; as `open_transformers`.
    """

    def __init__(
        self,
        model: str | Path = MASK2FORMER_ADE20K,
        *,
        palette: str = "ade20k",
        device: torch.device | str = "cpu",
    ) -> None:
        self.colours = None if palette == IDS else palette_colours(palette)  # K 3
        openers = ("AutoModelForUniversalSegmentation", "AutoModelForSemanticSegmentation")
        self.network, self.processor = open_transformers(model, openers, device, "segmentation")
        self.num_classes, self.device = int(self.network.config.num_labels), device
        if self.colours is None and self.num_classes > 256:
            raise ValueError(f"{model} has {self.num_classes} classes; a grey level can name 256")
        if self.colours is not None and self.num_classes != len(self.colours):
            raise ValueError(
                f"{model} has {self.num_classes} classes, the palette {palette} {len(self.colours)}; give a network of "
                f"that data set (model=), or another palette: {', '.join([*PALETTES, IDS])}"
            )

    @torch.inference_mode()
    def ids(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> classes (B, H, W), uint8 where there are at most 256, else int64."""
        pixels = checked_images(images)
        inputs = self.processor(
            images=list(pixels.permute(0, 3, 1, 2).cpu()), return_tensors="pt", input_data_format="channels_first"
        )
        values = inputs["pixel_values"].to(self.device)
        masks = {"pixel_mask": inputs["pixel_mask"].to(self.device)} if "pixel_mask" in inputs else {}
        sizes = [tuple(pixels.shape[1:3])] * len(pixels)
        maps = self.processor.post_process_semantic_segmentation(
            self.network(pixel_values=values, **masks), target_sizes=sizes
        )
        found = torch.stack(maps).to(images.device)
        return found.byte() if self.num_classes <= 256 else found

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> colours uint8 (B, H, W, 3); with the palette `ids` classes (B, H, W)."""
        ids = self.ids(images)
        return ids if self.colours is None else self.colours.to(ids.device)[ids.long()]
