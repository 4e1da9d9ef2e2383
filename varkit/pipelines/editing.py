"""Editing as every pipeline does it: what is kept, at which size, and how it comes back into the image.

The rules are in docs/editing.md. What a model is told is `known`: tokens, and which of them stay.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.pipelines.canvas import (
    Fit,
    Frame,
    check_fit,
    feathered,
    mask_values,
    on_canvas,
    on_window,
    paste_back,
    place,
    read_image,
)
from varkit.pipelines.edit import Box, box_mask, image_to_tensor, keep_coarse, keep_pyramid, to_grid
from varkit.samplers.next_group import Known

log = logging.getLogger("varkit.pipelines")

Images = Image.Image | Tensor | Sequence[Image.Image]
Masks = Image.Image | Tensor | Sequence[Image.Image]


@dataclass(frozen=True)
class EditOptions:
    """How an edit is done, besides what is redrawn and as what.

    Args:
        extend: out-painting: what is added at the top, left, bottom and right, as shares of the image's height or width
            (one number: all four), and drawn. The image is made smaller, so that both fit the model's size.
        strength: the share of scales, or of ordered tokens, that is drawn anew; the coarser ones stay, under the mask
            too. None keeps no more than the mask says.
        threshold: a token is redrawn where at least this share of what it covers is, in (0, 1].
        fit: how an image of another aspect ratio comes to the model's size: "stretch"; "crop", its middle; "pad", with
            its edge repeated. None is "pad" with extend, else "stretch".
        paste_back: put what was redrawn into the image as it was given, at its own size; what is kept stays to the bit.
        feather: with paste_back: over which share of the image's shorter side the drawn part fades into what is kept.
        height, width: of the model's canvas, where it can draw other sizes; None is its own.
    Raises: ValueError on a bad option.
    """

    extend: float | Sequence[float] | None = None
    strength: float | None = None
    threshold: float = 0.5
    fit: Fit | None = None
    paste_back: bool = False
    feather: float = 0.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.fit is not None:
            check_fit(self.fit)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], the share of a token that is redrawn; got {self.threshold}")
        if not 0 <= self.feather <= 0.5:
            raise ValueError(f"feather must be in [0, 0.5], a share of the image's shorter side; got {self.feather}")
        if self.feather and not self.paste_back:
            raise ValueError("feather= blends pixels of the drawn and the given image: it goes with paste_back=True")

    @classmethod
    def taken_from(cls, settings: dict[str, Any]) -> EditOptions:
        """Those of `settings` that are options of an edit; they are taken out."""
        return cls(**{f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings})


@dataclass
class EditPlan:
    """What an edit gives the sampler, and what it does with the answer; one image each."""

    options: EditOptions
    tokens: Tensor  # (B, L) or (B, L, C)
    keep: Tensor  # (L,) bool, or (B, L) where images differ
    redraws: list[Tensor]  # (H, W) each: 1 where the image is redrawn
    frames: list[Frame]
    images: list[Tensor | Image.Image]  # as given: (3, H, W) in [-1, 1], or RGB
    note: str = ""

    @property
    def nothing(self) -> bool:
        return bool(self.keep.all())

    def known(self, per: int) -> Known | None:
        """What a sampler keeps, for `per` images of each; None where all is drawn."""
        if not self.keep.any():
            return None
        keep = self.keep if self.keep.dim() == 1 else self.keep.repeat_interleave(per, 0)
        return self.tokens.repeat_interleave(per, 0), keep

    def pasted(self, drawn: Tensor, index: int) -> Tensor:
        """Image `index` with what was drawn, (3, h, w) in [0, 1], in its place: (3, H', W')."""
        frame, image = self.frames[index], self.images[index]
        alpha = on_window(self.redraws[index], frame, frame.shown)
        if self.nothing:
            alpha = torch.zeros_like(alpha)
        alpha = feathered(alpha, round(self.options.feather * min(alpha.shape)))
        if isinstance(image, Tensor):
            pixels = image.cpu() / 2 + 0.5
        else:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return paste_back(drawn.float().cpu(), pixels, frame, alpha)


def is_ordered(tokenizer: Any) -> bool:
    """Whether any number of first tokens is an image, as of FlexTok."""
    return "lengths" in inspect.signature(tokenizer.decode).parameters


def make_plan(
    tokenizer: Any,
    image: Images,
    mask: Masks | None,
    box: Box | None,
    keep: str,
    options: EditOptions,
    device: torch.device,
) -> EditPlan:
    """The plan of an edit; see `ClassToImagePipeline.edit`.

    Raises: TypeError, ValueError on a bad argument, or a model whose tokens have no places; before any network runs.
    """
    chosen = [n for n, v in (("mask=", mask), ("box=", box)) if v is not None]
    if len(chosen) > 1 or not (chosen or options.extend is not None or options.strength is not None):
        raise ValueError(
            "give exactly one of mask= and box=, or neither with extend= (out-painting) or strength= (variations)"
        )
    layout, canvas = tokenizer.layout, tokenizer.image_size
    grid = layout.grids[-1]
    if len(grid) != 2 and (chosen or options.extend is not None):
        raise ValueError(
            f"the {layout.length} tokens of this model have no places in the image (grid {grid}), so no "
            f"part of it can be kept; edit with a model whose tokens form a grid (h, w)"
            + (", or give strength= alone for variations" if is_ordered(tokenizer) else "")
        )
    coarse = None if options.strength is None else keep_coarse(layout, options.strength, is_ordered(tokenizer))
    images: list[Any]
    if isinstance(image, Tensor):
        images = list(image_to_tensor(image, canvas))
    else:
        images = [image] if isinstance(image, Image.Image) else list(image)
        images = [read_image(one) for one in images or [None]]
    sizes = [(one.shape[-2], one.shape[-1]) if isinstance(one, Tensor) else (one.height, one.width) for one in images]
    fit = options.fit or ("stretch" if options.extend is None else "pad")
    frames = [place(size, canvas, fit, options.extend) for size in sizes]
    masks = [None] * len(images) if mask is None else one_each(mask, len(images))
    keeps, redraws = [], []
    for frame, given in zip(frames, masks, strict=True):
        redraw, tokens = _redraw(frame, given, box, keep, grid, options)
        redraws.append(redraw)
        if tokens is None:  # everything, but for what stays of coarse scales
            kept = torch.zeros(layout.length, dtype=torch.bool)
        else:
            kept = keep_pyramid(layout, tokens, options.threshold)
            if not kept[layout.slices[-1]].any():
                kept = torch.zeros_like(kept)
        keeps.append(kept if coarse is None else kept | coarse)
    kept = keeps[0] if all(torch.equal(k, keeps[0]) for k in keeps) else torch.stack(keeps)
    pixels = torch.stack([on_canvas(one, frame, canvas) for one, frame in zip(images, frames, strict=True)])
    with torch.no_grad():
        encoded = tokenizer.encode(pixels.to(device))
    plan = EditPlan(options, encoded, kept.to(device), redraws, frames, images)
    plan.note = _note(plan, chosen, layout)
    if plan.note:
        log.warning("edit: %s", plan.note)
    return plan


def one_each(mask: Masks, count: int) -> list[Any]:
    """A mask for each image. Raises ValueError on another number of them."""
    masks = list(mask) if isinstance(mask, Sequence) and not isinstance(mask, str) else [mask] * count
    if len(masks) != count:
        raise ValueError(f"{count} images but {len(masks)} masks; give one for all, or one each")
    return masks


def _redraw(
    frame: Frame, mask: Any, box: Box | None, keep: str, grid: Any, options: EditOptions
) -> tuple[Tensor, Tensor | None]:
    """What is redrawn, (H, W) of the image, and the share of each token that is kept, (h, w); None where there is
    neither mask nor border."""
    if mask is None and box is None:
        if options.extend is None:
            return torch.ones(frame.image), None
        redraw = torch.zeros(frame.image)
    elif box is not None:
        kept = box_mask(frame.image, box, keep)
        redraw = 1 - kept
        if frame.whole:  # the box in tokens, as in the paper's notebook
            return redraw, box_mask(grid, box, keep)
    else:
        redraw = mask_values(mask)
        if frame.whole:  # averaged once, from its own size
            return to_grid(redraw, frame.image), 1 - to_grid(redraw, grid)
        redraw = to_grid(redraw, frame.image)
    return redraw, 1 - to_grid(on_window(redraw, frame, frame.window), grid)


def _note(plan: EditPlan, chosen: list[str], layout: Any) -> str:
    """What a user should know of an edit that is none, or redraws all."""
    if plan.nothing and (any((r > 0).any() for r in plan.redraws)):
        return (
            "no token is redrawn: what is marked covers less than the share `threshold` of each, lies outside of what "
            "fit='crop' leaves, or strength is too small; the image is given back"
        )
    if plan.nothing:
        return "nothing is marked to be redrawn: the image is given back"
    if chosen and not plan.keep.any():
        return "everything is marked: nothing of the image is kept, and images are drawn as if there were none"
    return ""


class Editing:
    """What pipelines share: a plan from the arguments, and an output from the answer."""

    def plan_edit(
        self: Any, image: Images, mask: Masks | None, box: Box | None, keep: str, settings: dict[str, Any]
    ) -> EditPlan:
        """Takes the options of an edit out of `settings`. Raises: see `make_plan`."""
        options = EditOptions.taken_from(settings)
        if options.paste_back and settings.get("output_type") == "latent":
            raise ValueError("paste_back= works on pixels: leave it out with output_type='latent'")
        part = self.at_size(options.height, options.width)
        return make_plan(part.image_tokenizer, image, mask, box, keep, options, self._execution_device)

    def carry_out(
        self: Any, plan: EditPlan, call: Callable[..., Any], settings: dict[str, Any], about: dict[str, Any]
    ) -> Any:
        """The pipeline's output of an edit.

        Args:
            call: of the pipeline, with the condition given.   settings: of the call.
            about: what the output says of the condition, where no network is asked: one for each image.
        """
        from varkit.pipelines.base import ImageOutput, as_output

        output_type, return_dict = settings.pop("output_type", "pil"), settings.pop("return_dict", True)
        per, options = settings.get("num_images_per_prompt", 1), plan.options
        self.check_call(output_type, per)
        inner = "pt" if options.paste_back else output_type
        if plan.nothing:
            began = time.perf_counter()
            tokens = plan.tokens.repeat_interleave(per, 0)
            part = self.at_size(options.height, options.width)
            with torch.no_grad():
                images = tokens if inner == "latent" else part.to_images(tokens, inner)
            stats = {"steps": 0, "network_calls": 0, "seconds": time.perf_counter() - began}
            about = {k: None if v is None else [one for one in v for _ in range(per)] for k, v in about.items()}
            out = ImageOutput(images=images, stats=stats, **{"class_labels": None, **about})
        else:
            sized = {k: getattr(options, k) for k in ("height", "width") if getattr(options, k) is not None}
            if settings.get("control") is not None:  # which would bring a size of its own
                canvas = self.at_size(options.height, options.width).image_tokenizer.image_size
                sized = dict(zip(("height", "width"), canvas, strict=True))
            out = call(known=plan.known(per), output_type=inner, **sized, **settings)
        if options.paste_back:
            pasted = [plan.pasted(one, i // per) for i, one in enumerate(out.images)]
            out.images = [as_output(one[None], output_type)[0] for one in pasted]
            if output_type != "pil":
                out.images = stacked(out.images)
        if plan.note:
            out.stats["note"] = plan.note
        return out if return_dict else (out.images,)


def stacked(images: list[Any]) -> Any:
    """Arrays or tensors as one. Raises ValueError on several sizes, which only a list can hold."""
    if len({tuple(one.shape) for one in images}) > 1:
        raise ValueError("paste_back gives each image its own size: take output_type='pil' for images of several sizes")
    return torch.stack(images) if isinstance(images[0], Tensor) else np.stack(images)
