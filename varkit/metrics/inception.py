"""Inception-v3 as the Frechet inception distance uses it: the TensorFlow network of 2015-12-05.

The topology is that of Szegedy et al. (arXiv 1512.00567) with 1008 classes. The average pools leave padding out of
the mean, and the last block pools by maximum: a slip of the original graph that every published FID contains.
The weights are `pt_inception-2015-12-05-6726825d.pth`, one file under two names in pytorch-fid and torch-fidelity;
torchvision's are those of another network.

Sources: mseitzer/pytorch-fid: src/pytorch_fid/inception.py (b9c1811); toshas/torch-fidelity:
torch_fidelity/feature_extractor_inceptionv3.py, utils/util_convert_inception_weights.py (5e211a9);
openai/guided-diffusion: evaluations/evaluator.py (22e0df8).
Shapes: B batch, C channels, H W height and width; at 299 x 299 pixels a `Mixed_6` block has 17 x 17 positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.checkpoints.files import load_strictly
from varkit.metrics.fid import spatial_features
from varkit.metrics.resize import Scaling, check_images, exact_matmul, resize, scale_pixels

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, int]
"""Channels, kernel and, where it is not 1, stride."""
Branches = dict[str, tuple[Layer | list[Layer], ...]]
"""Name of a branch -> its layers; a list is a fork, joined again after it. Their outputs are joined in this order."""

CLASSES = 1008
SMALLEST_SIDE = 75
"""Pixels; with fewer nothing is left for the last blocks."""

OUTPUTS = {
    "features_64": "pool_1",
    "features_192": "pool_2",
    "Mixed_6d.branch1x1": "Mixed_6d",
    "features_768": "Mixed_6e",
    "Mixed_6e": "Mixed_6e",
    "pool3": "Mixed_7c",
    "logits_unbiased": "Mixed_7c",
    "logits": "Mixed_7c",
    "softmax": "Mixed_7c",
}
"""What can be read -> the part after which it is."""

READ = {"features": "pool3", "logits": "logits_unbiased", "spatial": "Mixed_6d.branch1x1"}
"""What the metrics ask for -> what it is called here."""


def block_a(pooled: int) -> Branches:
    """At 35 x 35 positions."""
    return {
        "branch1x1": ((64, 1),),
        "branch5x5": ((48, 1), (64, 5)),
        "branch3x3dbl": ((64, 1), (96, 3), (96, 3)),
        "branch_pool": ((pooled, 1),),
    }


def block_c(narrow: int) -> Branches:
    """At 17 x 17; 7x7 convolutions as a row and a column."""
    row, column = (narrow, (1, 7)), (narrow, (7, 1))
    return {
        "branch1x1": ((192, 1),),
        "branch7x7": ((narrow, 1), row, (192, (7, 1))),
        "branch7x7dbl": ((narrow, 1), column, row, column, (192, (1, 7))),
        "branch_pool": ((192, 1),),
    }


FORK: list[Layer] = [(384, (1, 3)), (384, (3, 1))]
BLOCK_B: Branches = {"branch3x3": ((384, 3, 2),), "branch3x3dbl": ((64, 1), (96, 3), (96, 3, 2))}
BLOCK_D: Branches = {
    "branch3x3": ((192, 1), (320, 3, 2)),
    "branch7x7x3": ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
}
BLOCK_E: Branches = {
    "branch1x1": ((320, 1),),
    "branch3x3": ((384, 1), FORK),
    "branch3x3dbl": ((448, 1), (384, 3), FORK),
    "branch_pool": ((192, 1),),
}
MIXED = {"Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64), "Mixed_6a": BLOCK_B}
MIXED |= {"Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192)}
MIXED |= {"Mixed_7a": BLOCK_D, "Mixed_7b": BLOCK_E, "Mixed_7c": BLOCK_E}

# pytorch-fid's own module holds the same parts in four lists, and no classifier.
LISTS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. With stride 1 the size is kept, unless `same` is False."""

    def __init__(self, before: int, after: int, kernel: Kernel, stride: int = 1, *, same: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same and stride == 1 else 0
        self.conv = nn.Conv2d(before, after, (height, width), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Multiply the norm into the convolution, in double precision; a second time nothing is left to do."""
        if not isinstance(bn := self.bn, nn.BatchNorm2d):
            return
        weight, dtype = self.conv.weight.double(), self.conv.weight.dtype
        mean, variance = bn.get_buffer("running_mean").double(), bn.get_buffer("running_var").double()
        scale = bn.weight.double() / (variance + bn.eps).sqrt()
        self.conv.weight = nn.Parameter((weight * scale.view(-1, 1, 1, 1)).to(dtype), False)
        self.conv.bias = nn.Parameter((bn.bias.double() - mean * scale).to(dtype), False)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Branches side by side. One of them pools first, by mean or maximum; a block without it halves the size.

    Units are named branch, branch_1, branch_2, ..., and a and b in a fork.
    """

    def __init__(self, before: int, branches: Branches, *, maximum: bool = False) -> None:
        super().__init__()
        self.maximum, self.width = maximum, 0
        self.paths: dict[str, list[list[str]]] = {}
        for branch, steps in branches.items():
            width, self.paths[branch] = before, []
            for i, step in enumerate(steps, 1):
                fork = step if isinstance(step, list) else [step]
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                names = [f"{name}{'ab'[k]}" for k in range(len(fork))] if len(fork) > 1 else [name]
                for unit, layer in zip(names, fork, strict=True):
                    self.add_module(unit, Unit(width, *layer))
                self.paths[branch].append(names)
                width = sum(layer[0] for layer in fork)
            self.width += width
        if "branch_pool" not in branches:
            self.width += before

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for branch, path in self.paths.items():
            y = self._pooled(x) if branch == "branch_pool" else x
            for names in path:
                outputs = [self.get_submodule(name)(y) for name in names]
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            made.append(y)
        if "branch_pool" not in self.paths:
            made.append(F.max_pool2d(x, 3, 2))
        return torch.cat(made, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1) if self.maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class InceptionV3(nn.Module):
    """The network; weights come with `from_official`. Its keys are those of the released file.

    Args: classifier: without it there are no logits.
    """

    def __init__(self, *, classifier: bool = True) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.pool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, same=False)
        self.pool_2 = nn.MaxPool2d(3, 2)
        width = 192
        for name, branches in MIXED.items():
            block = Mixed(width, branches, maximum=name == "Mixed_7c")
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES) if classifier else None
        self.eval().requires_grad_(False)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], what: str = "the state dict") -> InceptionV3:
        """From the released file's tensors, or those of pytorch-fid's module, which have no classifier.

        Args:
            state: float tensors become float32; `num_batches_tracked` entries may be missing.
            what: the file, for errors.
        Raises: ValueError listing missing keys, unexpected keys and other shapes.
        """
        lists = any(key.startswith("blocks.") for key in state)
        with torch.device("meta"):
            model = cls(classifier=not lists or "fc.weight" in state)
        load_strictly(model, inception_from_official(state), what)
        return model.eval().requires_grad_(False)

    def fold(self) -> InceptionV3:
        """Itself, about a third faster: batch norms folded into convolutions, weights channels-last.

        Activations change by about 5e-6 of the largest, and the keys are no longer those of the file.
        """
        for module in self.modules():
            if isinstance(module, Unit):
                module.fold()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def forward(self, x: Tensor, outputs: Sequence[str] = ("pool3",)) -> dict[str, Tensor]:
        """What is asked for, and no part beyond the last one that it takes.

        Args:
            x: (B, 3, H, W) in the dtype of the weights, about [-1, 1]; 299 x 299 for published numbers.
            outputs: `features_64`, `features_192`, `features_768` (B, C), means over positions; `pool3` (B, 2048);
                `logits_unbiased` (B, 1008), of which the inception score is made, `softmax` of them, and `logits`, with
                the bias; `Mixed_6d.branch1x1` (B, 192, H', W') and `Mixed_6e` (B, 768, H', W'), after their ReLU.
        Raises: ValueError for an unknown output, other shapes, too small images, or logits without a classifier.
        """
        self._check(x, outputs)
        ahead = {OUTPUTS[name] for name in outputs}
        found: dict[str, Tensor] = {}
        with exact_matmul(x.device):
            for part, module in self.named_children():
                if part == "Mixed_6d" and ahead == {part}:
                    module = module.get_submodule("branch1x1")
                x = module(x)
                found |= {name: self._read(name, x) for name in outputs if OUTPUTS[name] == part}
                ahead.discard(part)
                if not ahead:
                    break
        return found

    def _read(self, output: str, x: Tensor) -> Tensor:
        """An output from the activations of its part."""
        if output == "Mixed_6e":
            return x
        if output == "Mixed_6d.branch1x1":
            return x[:, :192]  # the first branch comes first
        pooled = x.mean((2, 3))
        if self.fc is None or output == "pool3" or output.startswith("features"):
            return pooled
        logits = F.linear(pooled, self.fc.weight)
        return {"logits": logits + self.fc.bias, "logits_unbiased": logits, "softmax": logits.softmax(1)}[output]

    def _check(self, x: Tensor, outputs: Sequence[str]) -> None:
        if unknown := [name for name in outputs if name not in OUTPUTS]:
            raise ValueError(f"outputs are of {', '.join(OUTPUTS)}; got {', '.join(unknown)}")
        if self.fc is None and {"logits", "logits_unbiased", "softmax"} & set(outputs):
            raise ValueError("these weights have no classifier (fc.weight), as pytorch-fid's module: take the file")
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"x must be (B, 3, H, W), H and W at least {SMALLEST_SIDE}; got {tuple(x.shape)}")


def inception_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the released file from those of the file or of pytorch-fid's module; missing counters become 0."""
    result = {}
    for key, tensor in state.items():
        found = re.match(r"blocks\.(\d)\.(\d)\.(.+)", key)
        if found and int(found[1]) < len(LISTS) and int(found[2]) < len(LISTS[int(found[1])]):
            key = f"{LISTS[int(found[1])][int(found[2])]}.{found[3]}"
        result[key] = tensor.float() if tensor.is_floating_point() else tensor
    for key in [key for key in result if key.endswith(".bn.running_var")]:
        counter = key.replace("running_var", "num_batches_tracked")
        tensor = result.get(counter, torch.tensor(0))
        result[counter] = tensor.reshape(()) if tensor.numel() == 1 else tensor
    return result


class InceptionFeatures(nn.Module):
    """Inception with its input: from uint8 images to what the metrics read.

    Args:
        network: taken over: it gets the dtype and is folded.   size: (H, W) of its input.
        resize: keyword arguments of `varkit.metrics.resize.resize`; none are TensorFlow's way.
        scaling: see `varkit.metrics.resize.scale_pixels`.   dtype: `float32` or `float64`, of the network.
    Raises: ValueError for rules that cannot be.
    """

    def __init__(
        self,
        network: InceptionV3,
        *,
        size: Sequence[int] = (299, 299),
        resize: Mapping[str, Any] | None = None,
        scaling: Scaling | None = "(x-128)/128",
        dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64; got {dtype!r}")
        self.size, self.rule, self.scaling = tuple(size), dict(resize or {}), scaling
        self.network = network.to(getattr(torch, dtype)).fold()
        self.network._check(self.prepare(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)), ())  # refuses wrong rules

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) -> the network's input (B, 3, H, W). Resized and scaled in float32."""
        x = scale_pixels(resize(check_images(images), self.size, **self.rule), self.scaling)
        return x.to(self.network.Conv2d_1a_3x3.conv.weight.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor, outputs: Sequence[str] = tuple(READ)) -> dict[str, Tensor]:
        """Features of images, in the dtype of the network.

        Args:
            images: uint8 (B, 3, h, w).
            outputs: of `features` (B, 2048), `logits` (B, 1008) without bias, `spatial` (B, 2023) of sFID.
        Raises: ValueError for other images or names.
        """
        if unknown := [name for name in outputs if name not in READ]:
            raise ValueError(f"outputs are of {', '.join(READ)}; got {', '.join(unknown)}")
        read = self.network(self.prepare(images), [READ[name] for name in outputs])
        found = {name: read[READ[name]] for name in outputs}
        return {name: spatial_features(x) if name == "spatial" else x for name, x in found.items()}
