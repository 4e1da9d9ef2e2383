"""LPIPS, the learned perceptual distance (Zhang et al., arXiv 1801.03924).

Source: richzhang/PerceptualSimilarity: lpips/lpips.py, lpips/pretrained_networks.py (082bb24), versions 0.1 and 0.0.
What differs: the norm's derivative is finite where a feature vanishes (there gradients become infinite or NaN).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.metrics.weights import FOLDER_VARIABLE

logger = logging.getLogger(__name__)

Trunk = Literal["alex", "vgg", "squeeze"]
Version = Literal["0.1", "0.0"]


class TrunkSpec(NamedTuple):
    """builder: in torchvision.models.   slices: of its `features`, the end of each being read.   channels: read there.

    smallest: pixels a side below which the last slice is empty.   files: its weights, the usual name first.
    """

    builder: str
    slices: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    smallest: int
    files: tuple[str, ...]


_ALEX = ((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)), (64, 192, 384, 256, 256)
_VGG = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), (64, 128, 256, 512, 512)
_SQUEEZE = (
    ((0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13)),
    (64, 128, 256, 384, 384, 512, 512),
)
TRUNKS: dict[str, TrunkSpec] = {
    "alex": TrunkSpec("alexnet", *_ALEX, 31, ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")),
    "vgg": TrunkSpec("vgg16", *_VGG, 16, ("vgg16-397923af.pth",)),
    "squeeze": TrunkSpec("squeezenet1_1", *_SQUEEZE, 17, ("squeezenet1_1-b8a52dc0.pth",)),
}
TRUNKS_URL = "https://download.pytorch.org/models/"
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
SMALLEST_SIDE = 48
"""Below this, VGG's last slices see less than 3x3 positions: training recipes leave LPIPS out."""


class LPIPS(nn.Module):
    """Distance of two images in [-1, 1]: (B, 3, H, W) twice -> (B,). Random weights until some are loaded.

    Args:
        trunk: `alex` for reports, `vgg` as a training loss, `squeeze`. Their numbers do not compare.
        heads: weigh the channels; without, they are summed as they are.
        scaling_layer: ImageNet's mean and deviation are taken out first. Version 0.0 was released without.
    """

    shift: Tensor  # 1 3 1 1
    scale: Tensor

    def __init__(self, trunk: Trunk = "vgg", *, heads: bool = True, scaling_layer: bool = True) -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"trunk must be one of {', '.join(TRUNKS)}; got {trunk!r}")
        import torchvision

        spec = TRUNKS[trunk]
        with torch.device("meta"):  # most of a network is its classifier, which is not wanted
            features = getattr(torchvision.models, spec.builder)(weights=None).features
        cut = [OrderedDict((str(i), features[i]) for i in range(a, b)) for a, b in spec.slices]
        self.slices = nn.ModuleList(nn.Sequential(part) for part in cut)
        self.slices.to_empty(device=torch.get_default_device())
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(c)) for c in spec.channels if heads)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.trunk, self.scaling_layer = trunk, scaling_layer
        self.eval().requires_grad_(False)

    @property
    def smallest(self) -> int:
        """Pixels a side that an image must have."""
        return TRUNKS[self.trunk].smallest

    def forward(self, first: Tensor, second: Tensor, *, normalize: bool = False, spatial: bool = False) -> Tensor:
        """The distance of each pair, summed over layers.

        Args:
            first, second: (B, 3, H, W) in [-1, 1], or in [0, 1] with `normalize`.   normalize: map [0, 1] to [-1, 1].
            spatial: a map instead of its mean: each layer's, enlarged bilinearly to the image, summed.
        Returns: (B,), or (B, 1, H, W); float32.
        Raises: ValueError for other shapes and for images smaller than the trunk can read.
        """
        maps = self._maps(first, second, normalize)
        if spatial:
            size = first.shape[-2:]
            return torch.stack([F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]).sum(0)
        return torch.stack([m.mean((1, 2, 3)) for m in maps]).sum(0)

    def per_layer(self, first: Tensor, second: Tensor, *, normalize: bool = False) -> Tensor:
        """What each layer adds to the distance, (layers, B)."""
        return torch.stack([m.mean((1, 2, 3)) for m in self._maps(first, second, normalize)])

    def _maps(self, first: Tensor, second: Tensor, normalize: bool) -> Iterator[Tensor]:
        """(B, 1, h, w) of each layer."""
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
            raise ValueError(f"(B, 3, H, W) twice is needed; got {tuple(first.shape)} and {tuple(second.shape)}")
        if min(first.shape[-2:]) < self.smallest:
            raise ValueError(
                f"LPIPS({self.trunk}) needs images of at least {self.smallest} pixels a side; got "
                f"{first.shape[-2]}x{first.shape[-1]}. Enlarge them, or use a trunk that reads smaller ones: "
                + ", ".join(f"{name} {spec.smallest}" for name, spec in TRUNKS.items())
            )
        return self._layers(first, second, normalize)

    def _layers(self, first: Tensor, second: Tensor, normalize: bool) -> Iterator[Tensor]:
        x = torch.cat([first, second])
        if normalize:
            x = 2 * x - 1
        if self.scaling_layer:
            x = (x - self.shift) / self.scale
        for i, part in enumerate(self.slices):
            x = part(x)
            f = x.float()
            norm = f.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
            a, b = (f / (norm + 1e-10)).chunk(2)
            difference = (a - b).square()
            yield (difference * self.heads[i].view(1, -1, 1, 1) if self.heads else difference).sum(1, keepdim=True)

    def load(self, trunk_state: dict[str, Tensor], head_state: dict[str, Tensor]) -> None:
        """Take torchvision's `features.*` tensors (its classifier is left) and the `linN.model.1.weight` heads.

        Raises: ValueError listing what is missing, left over or of another shape.
        """
        number = {str(i): n for n, (a, b) in enumerate(TRUNKS[self.trunk].slices, 1) for i in range(a, b)}
        official = dict(head_state)
        for key, value in trunk_state.items():
            kind, _, rest = key.partition(".")
            index = rest.partition(".")[0]
            known = kind == "features" and index in number
            if kind != "classifier":
                official[f"net.slice{number[index]}.{rest}" if known else key] = value
        self.load_official(official)

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Take the state dict of the official module. A model without heads leaves those of the file.

        Raises: ValueError listing what is missing, left over or of another shape.
        """
        from varkit.checkpoints.files import load_strictly

        own = {"shift": self.shift, "scale": self.scale} | from_official(state)
        own = {k: v.to(self.shift.device) for k, v in own.items() if self.heads or not k.startswith("heads.")}
        load_strictly(self, own, f"the state dict of LPIPS({self.trunk})")


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the official module -> ours, float32. Unknown keys stay as they are, for strict loading to list.

    Raises: ValueError where an alias `lins.N` holds other values than `linN`.
    """
    own = {}
    for key, value in state.items():
        if found := re.fullmatch(r"net\.slice([1-9])\.(.+)", key):
            own[f"slices.{int(found[1]) - 1}.{found[2]}"] = value.float()
        elif found := re.fullmatch(r"lin(\d)\.model\.1\.weight", key):
            own[f"heads.{found[1]}"] = value.float().flatten()
        elif found := re.fullmatch(r"lins\.(.+)", key):
            original = state.get(f"lin{found[1]}")
            if original is None or not (value.is_meta or torch.equal(original, value)):
                raise ValueError(f"{key} must be the same as lin{found[1]}; it is not")
        else:
            own[key.removeprefix("scaling_layer.")] = value.float()
    return own


def to_official(model: LPIPS) -> dict[str, Tensor]:
    """Its weights under the keys of the official module, the aliases `lins.N` included."""
    official = {}
    for key, value in model.state_dict().items():
        kind, _, rest = key.partition(".")
        if kind == "slices":
            number, _, layer = rest.partition(".")
            official[f"net.slice{int(number) + 1}.{layer}"] = value
        elif kind == "heads":
            for name in (f"lin{rest}", f"lins.{rest}"):
                official[f"{name}.model.1.weight"] = value.view(1, -1, 1, 1)
        else:
            official[f"scaling_layer.{kind}"] = value
    return official


def find_lpips(weights: str, trunk: Trunk = "vgg", *, version: Version = "0.1", download: bool = True) -> LPIPS | None:
    """LPIPS with its released weights, or None with a notice in the log.

    The heads are those of the package `lpips` where it is installed (it is not imported).

    Args:
        weights: `none`; `auto`: the folder that VARKIT_WEIGHTS names, then the torch hub cache; or a folder. It holds
            torchvision's file of the trunk and, unless that package is installed, `v0.1/<trunk>.pth` (of the version
            wanted; `<trunk>.pth` for 0.1).
        download: with `auto`, fetch what is missing into the torch hub cache; None where that fails.
    Raises: FileNotFoundError naming the file, its address and where to put it, where nothing is to be downloaded;
        ValueError for another trunk or version, and files that do not fit.
    """
    if trunk not in TRUNKS or version not in ("0.1", "0.0"):
        raise ValueError(f"trunk is one of {', '.join(TRUNKS)}, version 0.1 or 0.0; got {trunk!r}, {version!r}")
    if weights == "none":
        return None
    files = []
    for missing in (_trunk_file(weights, trunk), _head_file(weights, trunk, version)):
        path = missing.found()
        if path is None and not (download and weights == "auto"):
            raise FileNotFoundError(missing.message(trunk))
        if path is None:
            try:
                path = missing.fetch()
            except OSError as error:  # URLError is one
                logger.warning("LPIPS weights are not reachable (%s): it is left out", error)
                return None
        files.append(path)
    model = LPIPS(trunk, scaling_layer=version == "0.1")
    model.load(*(_read(path) for path in files))
    return model


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # most of these files are too old for mmap
    except Exception as error:  # a broken pickle raises nearly anything
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"{path} is no file of plain tensors ({reason})") from None


class _Wanted(NamedTuple):
    """A file: where it may be, best first; its address; where to put it; the first digits of its SHA-256."""

    places: list[Path]
    url: str
    target: Path
    sha256: str | None = None

    def found(self) -> Path | None:
        return next((path for path in self.places if path.is_file()), None)

    def message(self, trunk: str) -> str:
        folders = dict.fromkeys(str(path.parent) for path in self.places)
        return (
            f"LPIPS({trunk}) needs {self.target.name}, which is not in {', '.join(folders)}. "
            f"Fetch {self.url} and put it into {self.target.parent} as {self.target.name}"
        )

    def fetch(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self.url, str(self.target), self.sha256, progress=False)
        return self.target


def _folders(weights: str) -> list[Path]:
    if weights != "auto":
        return [Path(weights).expanduser()]
    named = [Path(folder).expanduser() for folder in (os.environ.get(FOLDER_VARIABLE),) if folder]
    return [*named, Path(torch.hub.get_dir()) / "checkpoints"]


def _trunk_file(weights: str, trunk: str) -> _Wanted:
    names, folders = TRUNKS[trunk].files, _folders(weights)
    sha256 = names[0].rpartition("-")[2].removesuffix(".pth")
    places = [folder / name for folder in folders for name in names]
    return _Wanted(places, TRUNKS_URL + names[0], folders[-1] / names[0], sha256)


def _head_file(weights: str, trunk: str, version: str) -> _Wanted:
    released = f"v{version}/{trunk}.pth"
    names, cached = ([released, f"{trunk}.pth"], f"lpips_{trunk}.pth") if version == "0.1" else ([released], released)
    folders = _folders(weights)
    places = [folder / name for folder in folders for name in names]
    package = importlib.util.find_spec("lpips")
    for folder in (package and package.submodule_search_locations) or ():
        places.append(Path(folder) / "weights" / released)
    target = folders[-1] / (cached if weights == "auto" else names[-1])
    return _Wanted([*places, target], HEADS_URL + released, target)
