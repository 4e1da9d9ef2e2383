"""Control images (edges, depth, segmentation, ...) as a condition: encoded once, added where tokens are predicted.

The method is ControlAR's conditional decoding (Li et al., arXiv 2410.02705): a vision transformer turns a control image
into one vector for each token, and three projections of it are added to the hidden states at the positions that predict
these tokens, before the first block, the block at a third and that at two thirds of the depth. No token is added to the
sequence. ControlVAR (arXiv 2406.09750) makes a pyramid model draw the control beside the image; here a pyramid gets the
same features instead, resized to each of its scales.

There is no bias, so features of zero give exactly no control, and a weight of 0 leaves a model as it is to the bit.

Source: hustvl/ControlAR: autoregressive/models/gpt_t2i.py, gpt.py (87e32e9).

Shapes: B images, K controls each, L tokens, E width of the encoder, C width of the generator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from varkit.conditioning.control_encoder import ControlEncoder
from varkit.conditioning.label import drop_labels
from varkit.interfaces import Cond, Condition
from varkit.layout import Grid
from varkit.rng import Draw, Rng

logger = logging.getLogger(__name__)

Picture = Image.Image | Tensor
Pictures = Picture | Sequence[Image.Image]
Controls = Pictures | Mapping[str, Pictures]
"""One control, or several by kind. Each is one image for all, or one an image."""
Strength = float | Sequence[float] | Tensor | Mapping[str, float | Sequence[float] | Tensor]

NO_DECAY = ("cls_token", "pos_embed", "kind_embed")
"""Names of the network's parameters that are trained without weight decay, besides biases and 1-D tensors."""

Fused = dict[int, Tensor]
"""What is added before a block, by its number: (B, L, C) each."""

ENCODERS: dict[str, dict[str, Any]] = {
    "dinov2-small": {"width": 384, "heads": 6, "depth": 12, "patch": 14, "stride": 16, "grid": 37, "layer_scale": True},
    "dinov2-base": {"width": 768, "heads": 12, "depth": 12, "patch": 14, "stride": 16, "grid": 37, "layer_scale": True},
    "vit-small": {"width": 384, "heads": 6, "depth": 12, "patch": 16, "grid": 14, "norm_eps": 1e-12},
}
"""Those of the release, as arguments of `ControlEncoder`."""


# ---- what a user gives --------------------------------------------------------------------------------------------


def control_pixels(image: Picture, size: tuple[int, int], name: str) -> Tensor:
    """One PIL image, or a tensor of one or several, as (n, 3, H, W) float in [-1, 1].

    A PIL image is resized to `size`: palette images, which name things, by the nearest pixel, all others with an
    antialiased bilinear kernel. Grey becomes three equal channels, what is transparent becomes black.

    Raises: ValueError on another size, shape or range of a tensor, TypeError on anything else.
    """
    if isinstance(image, Tensor):
        return _tensor_pixels(image, size, name)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} must be a PIL image, a list of them or a tensor; got {type(image).__name__}")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has pixels of mode {image.mode}, whose range is not known; give 8 or 16 bits")
    kernel = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BILINEAR
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("RGB")
    if image.size != size[::-1]:
        shape = f"{image.size[0]}x{image.size[1]}"
        note = ", which changes its proportions" if image.size[0] * size[0] != image.size[1] * size[1] else ""
        logger.info("%s of %s pixels (w x h) is resized to %dx%d%s", name, shape, size[1], size[0], note)
        image = image.resize(size[::-1], kernel)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def _tensor_pixels(image: Tensor, size: tuple[int, int], name: str) -> Tensor:
    x = image[None] if image.dim() == 3 else image
    if x.dim() != 4 or x.shape[1] not in (1, 3) or tuple(x.shape[-2:]) != size:
        raise ValueError(f"{name} as a tensor must be (B, 3 or 1, {size[0]}, {size[1]}); got {tuple(image.shape)}")
    if x.dtype == torch.uint8:
        x = x.float() / 127.5 - 1
    elif not x.is_floating_point():
        raise ValueError(f"{name} as a tensor must be float in [-1, 1] or uint8; got {x.dtype}")
    elif not bool((x.abs() <= 1.001).all()):
        raise ValueError(f"{name} as a tensor of floats must lie in [-1, 1]; got [{x.min():.3g}, {x.max():.3g}]")
    return x.float().expand(-1, 3, -1, -1)


def drawn_pixels(maps: Tensor) -> Tensor:
    """uint8 maps (B, H, W) or (B, H, W, 3), as an extractor gives them, -> (B, 3, H, W) float in [-1, 1]."""
    maps = maps[..., None] if maps.dim() == 3 else maps
    return maps.permute(0, 3, 1, 2).float().div(127.5).sub(1).expand(-1, 3, -1, -1)


class ControlCondition(Condition):
    """Control images as a condition.

    Args:
        size: height and width of the images that are drawn: what control images are brought to.
        kinds: names of the controls that a model tells apart; empty for a model of one control.
    """

    def __init__(self, size: tuple[int, int], kinds: Sequence[str] = ()) -> None:
        self.size, self.kinds = size, tuple(kinds)

    def encode(  # type: ignore[override]
        self, *, control: Controls, strength: Strength = 1.0, count: int | None = None, **_: Any
    ) -> Cond:
        """Control images of `count` images, one for all or one each.

        Args:
            control: an image, a list of images, or a tensor (B, 3 or 1, H, W), float in [-1, 1] or uint8; or several
                of them by kind, of which a model of several kinds needs not all.
            strength: how strongly they steer, from 0 (not at all): a number, one an image, or either by kind.
            count: None is the number of images given.
        Raises: ValueError naming the bad value and the allowed ones; TypeError on anything but images.
        """
        given = self._by_kind(control)
        pixels = {kind: self._pixels(images, kind) for kind, images in given.items()}
        longest = max(len(x) for x in pixels.values())
        count = longest if count is None else count
        for kind, x in pixels.items():
            if len(x) not in (1, count):
                raise ValueError(
                    f"{len(x)} images of {kind or 'control'} for {count} images; give one, or one an image"
                )
        names = self.kinds or ("",)
        blank = next(iter(pixels.values())).new_zeros(1, 3, *self.size)
        images = torch.stack([pixels.get(k, blank).expand(count, -1, -1, -1) for k in names], 1)  # B K 3 H W
        weights = [self._weights(strength, k, count) if k in pixels else torch.zeros(count) for k in names]
        return Cond(control=images, control_weight=torch.stack(weights, 1).to(images.device))

    def _by_kind(self, control: Controls) -> dict[str, Pictures]:
        if not isinstance(control, Mapping):
            if len(self.kinds) > 1:
                example = f"control={{'{self.kinds[0]}': image}}"
                raise ValueError(f"this model knows several controls: say which, as in {example}")
            return {(self.kinds or ("",))[0]: control}
        if not control:
            raise ValueError("control is empty: give at least one image")
        if not self.kinds:
            if len(control) > 1:
                raise ValueError(f"this model knows one control; got {', '.join(control)}")
            return {"": next(iter(control.values()))}
        if unknown := [kind for kind in control if kind not in self.kinds]:
            raise ValueError(f"this model knows no control {unknown[0]!r}; it knows {', '.join(self.kinds)}")
        return dict(control)

    def _pixels(self, images: Pictures, kind: str) -> Tensor:
        name = f"control {kind}".strip()
        if isinstance(images, Image.Image | Tensor):
            return control_pixels(images, self.size, name)
        if not isinstance(images, Sequence) or isinstance(images, str) or not images:
            raise TypeError(f"{name} must be a PIL image, a non-empty list of them or a tensor; got {images!r:.80}")
        return torch.cat([control_pixels(image, self.size, f"{name} {i}") for i, image in enumerate(images)])

    @staticmethod
    def _weights(strength: Strength, kind: str, count: int) -> Tensor:
        """(B,) of one kind."""
        if isinstance(strength, Mapping):
            strength = strength.get(kind, 1.0)
        values = torch.as_tensor(strength, dtype=torch.float32, device="cpu").reshape(-1)
        if len(values) not in (1, count):
            raise ValueError(f"{len(values)} control strengths for {count} images; give one, or one an image")
        if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
            raise ValueError(f"a control strength must be a number from 0 (1 is as trained); got {strength}")
        return values.expand(count)

    def null(self, like: Cond) -> Cond:
        """The same shapes, of weight 0."""
        if like.control is None or like.control_weight is None:
            raise ValueError("the condition given holds no control images")
        return Cond(control=torch.zeros_like(like.control), control_weight=torch.zeros_like(like.control_weight))


# ---- the network --------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """fc2(gelu(fc1 x)), without biases."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, out, bias=False)
        self.fc2 = nn.Linear(out, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def to_grid(features: Tensor, grid: Grid) -> Tensor:
    """(B, E, h, w) -> (B, n, E) of a grid (h', w') in raster order: means of areas where it is coarser, bilinear where
    it is finer, and the features themselves where it is the same."""
    own = tuple(features.shape[-2:])
    if own != grid:
        if grid[0] <= own[0] and grid[1] <= own[1]:
            features = F.adaptive_avg_pool2d(features, (grid[0], grid[1]))
        else:
            features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
    return features.flatten(2).transpose(1, 2)


def injection_layers(depth: int) -> tuple[int, int, int]:
    """Blocks before which controls are added. Raises ValueError for fewer than three."""
    if depth < 3:
        raise ValueError(f"control is added at the first block, at a third and at two thirds: depth {depth} is below 3")
    return 0, depth // 3, 2 * (depth // 3)


class Control(nn.Module):
    """Control images -> what is added to the hidden states of a generator.

    Args:
        hidden_size, depth: of the generator.
        encoder: a name in `ENCODERS`, or arguments of `ControlEncoder`.
        kinds: names of the controls that are told apart, each by a learned vector; one name or none for one control.
        resize: the encoder's, where it is named: see `ControlEncoder`.
    Raises: ValueError on a bad argument.
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        encoder: str | Mapping[str, Any] = "vit-small",
        kinds: Sequence[str] = (),
        resize: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(encoder, str) and encoder not in ENCODERS:
            raise ValueError(f"no control encoder is called {encoder!r}; known: {', '.join(ENCODERS)}")
        sizes = dict(ENCODERS[encoder] if isinstance(encoder, str) else encoder)
        if resize is not None:
            sizes["resize"] = resize
        try:
            self.encoder = ControlEncoder(**sizes)
        except TypeError as error:
            raise ValueError(
                f"the control encoder must be one of {', '.join(ENCODERS)}, or width, depth, heads, patch and grid of "
                f"one: {error}"
            ) from None
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"kinds of control must differ; got {list(kinds)}")
        self.kinds = tuple(kinds)
        self.layers = injection_layers(depth)
        self.adapter_mlp = Projection(sizes["width"], hidden_size)
        self.condition_mlp = Projection(hidden_size, hidden_size)
        self.condition_layers = nn.ModuleList(Projection(hidden_size, hidden_size) for _ in self.layers)
        if len(self.kinds) > 1:
            self.kind_embed = nn.Parameter(torch.empty(len(self.kinds), sizes["width"]))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, encoder: bool = True, official: bool = False) -> None:
        """Projections normal, so that what goes through keeps its size; the last of each injection zero, so that a
        generator begins as it was.

        Args:
            encoder: initialise it too; False keeps what was loaded.
            official: as the release, whose constructor draws all linear weights anew, also those of the encoder just
                loaded: normal, std 0.02, biases zero. Released weights do not depend on it.
        """
        if encoder:
            self.encoder.init_weights()
        if len(self.kinds) > 1:
            nn.init.normal_(self.kind_embed, std=0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear) and official:
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if official:
            return
        for part in (self.adapter_mlp, self.condition_mlp, *self.condition_layers):
            for linear in (part.fc1, part.fc2):  # type: ignore[union-attr]
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # type: ignore[union-attr, operator, arg-type]
        for layer in self.condition_layers:
            nn.init.zeros_(layer.fc2.weight)  # type: ignore[union-attr, arg-type]

    def features(self, images: Tensor, grids: Sequence[Grid], kind: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) -> (N, L, E): the encoder's map at each grid, one after the other.

        Args: kind: (N,), which of `kinds` each is.
        """
        encoded = self.encoder(images)
        x = torch.cat([to_grid(encoded, grid) for grid in grids], 1)
        return x + self.kind_embed[kind][:, None] if kind is not None and len(self.kinds) > 1 else x

    def project(self, features: Tensor) -> list[Tensor]:
        """(N, L, E) -> what is added at each of `layers`, (N, L, C) each, at strength 1."""
        x = self.condition_mlp(self.adapter_mlp(features))
        return [layer(x) for layer in self.condition_layers]

    def forward(self, control: Tensor, weight: Tensor, grids: Sequence[Grid]) -> Fused:
        """What is added before each of `layers`: the controls of an image, each times its weight, summed.

        Where no gradient is wanted, controls of weight 0 are not looked at.

        Args: control, weight: (B, K, 3, H, W) in [-1, 1] and (B, K).   grids: of the tokens.
        Raises: ValueError for another number of controls than of kinds, or grids that are not (h, w).
        """
        batch, count = weight.shape
        if self.kinds and count != len(self.kinds):
            raise ValueError(f"{count} control images for each image; this model has kinds {', '.join(self.kinds)}")
        if any(len(grid) != 2 for grid in grids):
            raise ValueError(f"control needs tokens that have a place in the image; these have grids {list(grids)}")
        device = self.encoder.cls_token.device
        flat, weights = control.to(device).flatten(0, 1), weight.to(device).flatten()  # B*K ...
        kind = torch.arange(count, device=device).repeat(batch)
        rows = None
        if not torch.is_grad_enabled():
            rows = weights.nonzero()[:, 0]
            flat, weights, kind = flat[rows], weights[rows], kind[rows]
        length = sum(grid[0] * grid[1] for grid in grids)
        if len(flat) == 0:
            shape = (batch, length, self.condition_mlp.fc2.out_features)
            return dict.fromkeys(self.layers, self.encoder.cls_token.new_zeros(shape))
        fused: Fused = {}
        for layer, x in zip(self.layers, self.project(self.features(flat, grids, kind)), strict=True):
            x = x * weights[:, None, None].to(x.dtype)
            if rows is not None:
                x = x.new_zeros(batch * count, *x.shape[1:]).index_copy_(0, rows, x)
            fused[layer] = x.unflatten(0, (batch, count)).sum(1)
        return fused


def inject(x: Tensor, fused: Fused | None, layer: int, where: slice = slice(None)) -> Tensor:
    """Hidden states (B, n, C) as block `layer` reads them: those of the positions `where` with the control added."""
    return x if fused is None or layer not in fused else x + fused[layer][:, where].to(x.dtype)


class Controlled:
    """For a generator, beside its other bases: it may have a network for control images, named `controller`.

    Its constructor takes `control`, the arguments of `Control` after the first two or None, and `control_drop_rate`,
    and calls `add_control`. Its blocks are `depth` of its config, or the sum of `depths`, of stacks.
    """

    layout: Any
    config: Any
    full_rate: tuple[str, ...] = ()
    register_to_config: Callable[..., None]

    def add_control(self, settings: Mapping[str, Any] | None) -> None:
        """Make the network of these arguments. Raises ValueError where it cannot be."""
        self.controller: Control | None = None
        if settings is None:
            return
        if bad := [grid for grid in self.layout.grids if len(grid) != 2]:
            raise ValueError(f"control needs tokens that have a place in the image; this model has the grid {bad[0]}")
        try:
            depth = sum(self.config.depths) if "depths" in self.config else self.config.depth
            self.controller = Control(self.config.hidden_size, depth, **settings)
        except TypeError as error:
            raise ValueError(f"control= has encoder, kinds and resize: {error}") from None
        self.register_to_config(control=dict(settings))

    def fuse(self, cond: Cond, order: Tensor | None = None) -> Fused | None:
        """What the control images of `cond` add; None where there are none.

        Args: order: (L,) positions in the order in which the hidden states stand; None is that of the layout.
        Raises: ValueError when there are some and the generator takes none.
        """
        if cond.control is None or cond.control_weight is None:
            return None
        if self.controller is None:
            raise ValueError(
                f"this {type(self).__name__} takes no control images: leave control out, or take a model that was "
                f"trained with them (docs/control.md)"
            )
        fused: Fused = self.controller(cond.control, cond.control_weight, self.layout.grids)
        return fused if order is None else {layer: x[:, order] for layer, x in fused.items()}


def dropped(weight: Tensor | None, rows: Tensor, rng: Rng, rate: float) -> Tensor | None:
    """Weights (B, K) in training: 0 in `rows` (B,) bool, whose other condition is dropped too, and 0 where a control is
    dropped by itself, each with probability `rate`."""
    if weight is None:
        return None
    gone = rows[:, None].to(weight.device)
    if rate > 0:
        u = rng.uniform(torch.arange(weight.shape[1]), Draw.CONTROL_DROP)  # B K
        gone = gone | (u.to(weight.device) < rate)
    return weight.masked_fill(gone, 0)


def dropped_together(cond: Cond, rng: Rng, rate: float, null: int, alone: float) -> tuple[Tensor, Tensor | None]:
    """Class ids (B,) and weights of controls (B, K) in training: with probability `rate` an image has neither, and with
    probability `alone` a control is left out by itself. Args: null: the class that stands for none."""
    gone = drop_labels(torch.zeros_like(cond.labels), rng, rate, 1).bool()
    return cond.labels.masked_fill(gone, null), dropped(cond.control_weight, gone, rng, alone)


def first_rows(fused: Fused | None, count: int) -> Fused | None:
    """Of the first rows alone: for a batch that is run without its unconditional half."""
    return fused and {layer: x[:count] for layer, x in fused.items()}
