"""REPA for FlexTok: patches of an early block of the decoder are pulled towards a frozen encoder's features of the
image (Yu et al., "Representation Alignment for Generation", arXiv 2410.06940; FlexTok, arXiv 2502.13967).

FlexTok's release keeps the hook for it (apple/ml-flextok: flextok/model/trunks/transformers.py (87d00cc):
`intermediate_layers`, [1] in the released configurations) and no loss; that the patches are resized to the encoder's
grid, and not the other way round, is what the paper and public training code have.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.training.objectives.variants.arra import Projector


@config
class Repa:
    """An added loss, 1 - cosine of projected patches and the encoder's, mean over the encoder's grid."""

    encoder: str = "vit_large_patch14_dinov2.lvd142m"  # any model name of timm that gives a map of features
    weights: str = "pretrained"  # `pretrained` (timm's cache, else the network), a file, or `none`: random, for tests
    size: int | None = None  # side of the images that it sees; None: what it was made for (518: a grid of 37x37)
    layer: int = 1  # index of the decoder's block whose output is aligned: from 0, as in the release
    projector_depth: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("projector_depth", 1), ("weight", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"objective.repa.{name} must be at least {least}; got {getattr(self, name)}")


class PatchAlignment(nn.Module):
    """What is learnt for it, the projector, and the loss. Args: dim, out: widths of decoder and encoder."""

    def __init__(self, dim: int, out: int, depth: int) -> None:
        super().__init__()
        self.projector = Projector(dim, out, depth)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Patches (B, dim, gh, gw), and features (B, out, h, w) that they are resized to -> a scalar, float32."""
        if hidden.shape[2:] != features.shape[2:]:
            hidden = F.interpolate(hidden.float(), size=features.shape[2:], mode="bilinear", antialias=True)
        projected = self.projector(hidden.flatten(2).transpose(1, 2))  # B h w, out
        wanted = features.flatten(2).transpose(1, 2)
        return (1 - F.cosine_similarity(projected.float(), wanted.float(), dim=-1)).mean()
