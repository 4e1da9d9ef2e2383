"""LPIPS, the learned perceptual distance (Zhang et al., arXiv 1801.03924).

Source: richzhang/PerceptualSimilarity: lpips/lpips.py, lpips/pretrained_networks.py (082bb24), version 0.1.
What differs: the norm's derivative is finite at an all-zero feature (there it gives NaN gradients).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Trunk = Literal["alex", "vgg", "squeeze"]

# Trunk -> (torchvision model, its features cut into these slices, channels of each slice's output).
TRUNKS: dict[str, tuple[str, tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "alex": ("alexnet", ((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)), (64, 192, 384, 256, 256)),
    "vgg": ("vgg16", ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), (64, 128, 256, 512, 512)),
    "squeeze": (
        "squeezenet1_1",
        ((0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13)),
        (64, 128, 256, 384, 384, 512, 512),
    ),
}
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{}.pth"
SMALLEST_SIDE = 48
"""Below this, VGG's last slices see less than 3x3 positions: training recipes leave LPIPS out."""


class LPIPS(nn.Module):
    """Distance of two images in [-1, 1]: (B, 3, H, W) twice -> (B,).

    Args: trunk: `alex` for reports, `vgg` as a training loss, `squeeze`.
    """

    shift: Tensor  # 1 3 1 1
    scale: Tensor

    def __init__(self, trunk: Trunk = "vgg") -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"trunk must be one of {', '.join(TRUNKS)}; got {trunk!r}")
        import torchvision

        name, slices, channels = TRUNKS[trunk]
        features = getattr(torchvision.models, name)(weights=None).features
        self.slices = nn.ModuleList(nn.Sequential(*features[a:b]) for a, b in slices)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(c)) for c in channels)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.trunk = trunk
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = torch.cat([first, second])
        x = (x - self.shift) / self.scale
        total = first.new_zeros(first.shape[0], dtype=torch.float32)
        for part, head in zip(self.slices, self.heads, strict=True):
            x = part(x)
            f = x.float()
            norm = f.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
            a, b = (f / (norm + 1e-10)).chunk(2)
            total = total + ((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def load(self, trunk_state: dict[str, Tensor], head_state: dict[str, Tensor]) -> None:
        """Take torchvision's `features.*` tensors and the official `linN.model.1.weight` heads."""
        starts = [a for a, _ in TRUNKS[self.trunk][1]]
        for part, start in zip(self.slices, starts, strict=True):
            own: dict[str, Any] = {}
            for key in part.state_dict():
                index, _, rest = key.partition(".")
                own[key] = trunk_state[f"features.{int(index) + start}.{rest}"]
            part.load_state_dict(own)
        for i, head in enumerate(self.heads):
            head.data.copy_(head_state[f"lin{i}.model.1.weight"].flatten())


def find_lpips(weights: str, trunk: Trunk = "vgg") -> LPIPS | None:
    """LPIPS with its released weights, or None with a notice in the log.

    Args:
        weights: `none`; `auto` (torchvision's and the official files, from their caches or the network);
            or a folder holding `<trunk>.pth` (heads) and torchvision's file of the trunk.
    Raises: FileNotFoundError when a folder was named and a file is missing.
    """
    if weights == "none":
        return None
    from torchvision.models import get_model_weights

    model = LPIPS(trunk)
    entry = next(iter(get_model_weights(TRUNKS[trunk][0])))
    if weights != "auto":
        folder = Path(weights)
        heads, trunk_file = folder / f"{trunk}.pth", folder / Path(entry.url).name
        for file in (heads, trunk_file):
            if not file.is_file():
                raise FileNotFoundError(f"LPIPS needs {file}; put {heads.name} and {trunk_file.name} in {folder}")
        model.load(_read(trunk_file), _read(heads))
        return model
    try:
        head_state = torch.hub.load_state_dict_from_url(
            HEADS_URL.format(trunk), file_name=f"lpips_{trunk}.pth", weights_only=True, progress=False
        )
        trunk_state = torch.hub.load_state_dict_from_url(entry.url, weights_only=True, progress=False)
    except OSError as error:  # URLError is one
        logger.warning("LPIPS weights are not reachable (%s): training goes on without the perceptual loss", error)
        return None
    model.load(trunk_state, head_state)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)
