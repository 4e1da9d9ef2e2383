"""ARRA: hidden states of the generator are pulled towards a frozen image encoder's features (arXiv 2503.07334).

Source: xiexing0916/ARRA (8fabe47): arra/model/adaptor.py, arra/model/modeling_xllmx_chameleon_align.py. As released,
every image position is aligned to one global feature of the image, at the output of the first block. What differs: any
timm encoder; the alignment does not vanish when the z loss is off; positions come from the layout, not from the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.checkpoints.files import read_state_dict
from varkit.config import ConfigError, config, nearest
from varkit.heads.categorical import z_loss
from varkit.layout import TokenLayout


@config
class Alignment:
    """An added loss, 1 - cosine of projected hidden states and the encoder's feature."""

    encoder: str  # any model name of timm
    weights: str  # `pretrained` (timm's cache, else the network), a file, or `none`: random, for tests
    layer: int = 1  # the block whose output is aligned, from 1
    positions: Literal["all", "last_grid"] = "all"  # all tokens, or those of the finest scale
    projector_depth: int = 2
    weight: float = 1.0
    z_weight: float = 0.0  # of the z loss; released: 1e-5

    def __post_init__(self) -> None:
        for name, least in (("layer", 1), ("projector_depth", 1), ("weight", 0), ("z_weight", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"objective.alignment.{name} must be at least {least}; got {getattr(self, name)}")


class Projector(nn.Module):
    """Linear layers with GELU between, (..., dim) -> (..., out)."""

    def __init__(self, dim: int, out: int, depth: int = 2) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Linear(dim, out)]
        for _ in range(depth - 1):
            parts += [nn.GELU(), nn.Linear(out, out)]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class FrozenEncoder(nn.Module):
    """A timm model's pooled feature, (B, 3, H, W) in [-1, 1] -> (B, D), at the size and range that it was made for.

    Args:
        weights: `pretrained`, `none` or a file.   section: of the objective, for errors.
        size: side of the images that it sees instead; tables of positions are resized to it.
    Raises: ConfigError on an unknown name, weights that are not to be had or do not fit, a size that it cannot take.
    """

    mean: Tensor  # 1 3 1 1
    std: Tensor

    def __init__(self, name: str, weights: str, section: str = "alignment", size: int | None = None) -> None:
        super().__init__()
        self.section = section
        import timm
        from timm.data import resolve_model_data_config

        if not timm.is_model(name):
            raise ConfigError(
                f"objective.{section}.encoder must be a model of timm; got {name!r}{nearest(name, timm.list_models())}"
            )
        try:
            self.model: Any = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"objective.{section}.encoder {name} cannot be had: {error}. Give objective.{section}.weights=FILE"
            ) from None
        if weights not in ("pretrained", "none"):
            self._load(Path(weights))
        data = resolve_model_data_config(self.model)
        self.size: tuple[int, int] = tuple(data["input_size"][1:])
        if size is not None:
            self._resize(size)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1))
        model: Any = self.model
        self.dim = int(getattr(model, "head_hidden_size", None) or model.num_features)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"objective.{self.section}.weights must be pretrained, none or a file; got {path}")
        heads = self.model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(tuple(f"{h}." for h in heads))}
        have = {k: tuple(v.shape) for k, v in self.model.state_dict().items()}
        wrong = sorted(k for k in have.keys() | state.keys() if k not in state or have.get(k) != tuple(state[k].shape))
        if wrong:
            wrong_ones = ", ".join(wrong[:5])
            raise ConfigError(f"objective.{self.section}.weights {path} do not fit the encoder: {wrong_ones} ...")
        self.model.load_state_dict(state)

    def _resize(self, side: int) -> None:
        step = max(getattr(getattr(self.model, "patch_embed", None), "patch_size", (1,)))
        if side < 1 or side % step:
            raise ConfigError(f"objective.{self.section}.size must be a multiple of {step}, its patch; got {side}")
        self.size = (side, side)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=self.size)

    def _seen(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((images + 1) / 2 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(self._seen(images)), pre_logits=True)

    @property
    def map_dim(self) -> int:
        """D of `maps`. Raises: ConfigError where the model has none."""
        if not hasattr(self.model, "forward_intermediates") or not hasattr(self.model, "feature_info"):
            raise ConfigError(
                f"objective.{self.section}.encoder {type(self.model).__name__} gives no map of features; take one that "
                "does, such as a ViT"
            )
        return int(self.model.feature_info[-1]["num_chs"])

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """The last features as a map, normalised where the model does so: (B, D, h, w); of a ViT, its patches."""
        (found,) = self.model.forward_intermediates(self._seen(images), indices=1, norm=True, intermediates_only=True)
        return found


def image_positions(hidden: Tensor, layout: TokenLayout, which: str) -> Tensor:
    """The hidden states (B, n, C) that are aligned: all, or those of the last grid among the n positions."""
    if which == "all":
        return hidden
    last = next(s for s in layout.slices if s.stop == hidden.shape[1])
    return hidden[:, last]


def alignment_loss(projected: Tensor, feature: Tensor) -> Tensor:
    """Mean over images of 1 - mean over tokens of the cosine; (B, n, D) and (B, D) -> a scalar, float32."""
    cosine = F.cosine_similarity(projected.float(), feature.float()[:, None], dim=-1)  # B n
    return (1 - cosine.mean(1)).mean()


def language_losses(
    logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The release's cross entropy and z loss of one sequence of text and image tokens.

    Args: logits: (B, n, V).   labels: (B, n).   shift: a logit answers the label after it.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != ignore_index
    return F.cross_entropy(logits[valid].float(), labels[valid]), z_loss(logits[valid])
