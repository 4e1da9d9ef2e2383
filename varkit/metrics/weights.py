"""Where the weights of a network that looks at images are: a path, a folder, a cache; or downloaded when asked for.

Nothing is fetched unless the caller says so, and then only a file whose checksum is known here. What is missing is
named: the file, its size, where it comes from and where to put it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "VARKIT_WEIGHTS"
"""Environment variable: a folder that holds weight files under their released names."""


@dataclass(frozen=True)
class WeightsFile:
    """A released file.

    files: names it is found under, the first being the usual one.   what: the network, for people.   size: for people.
    layout: of its keys, for people.   url: where it comes from.   sha256: the checksum or its first digits; without one
    the file is not downloaded, it is for the user to fetch and to trust.
    repo: repository of the Hugging Face hub in whose cache it may lie.
    """

    files: tuple[str, ...]
    what: str
    size: str
    layout: str
    url: str
    sha256: str = ""
    repo: str = ""


KNOWN = {
    "inception": WeightsFile(
        files=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        what="the Inception of the FID papers (TensorFlow, 2015-12-05)",
        size="91 MB",
        layout="Conv2d_1a_3x3.conv.weight, ... fc.weight of 1008 classes",
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
    ),
    "i3d": WeightsFile(
        files=("i3d_pretrained_400.pt",),
        what="I3D of Kinetics-400, converted from the TF hub",
        size="49 MB",
        layout="Conv3d_1a_7x7.conv3d.weight, ... logits.conv3d.weight of 400 classes",
        url="https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
        "810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/i3d_pretrained_400.pt",
    ),
    "videomae": WeightsFile(
        files=("vit_g_hybrid_pt_1200e_ssv2_ft.pth",),
        what="VideoMAE v2, ViT-g, fine-tuned on Something-Something v2",
        size="2.0 GB",
        layout="patch_embed.proj.weight, blocks.0 ... blocks.39, fc_norm.weight",
        url="https://huggingface.co/OpenGVLab/VideoMAE2/resolve/97d119d270aca7a1217fff7f413c0c543eb325d9/"
        "mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth",
        sha256="5a210a92f035dff30c53b46157b612e7a1a5d3c99700e1b2d71da5c399ca7e70",
        repo="OpenGVLab/VideoMAE2",
    ),
    "hed": WeightsFile(
        files=("ControlNetHED.pth",),
        what="HED edges, as ControlNet trained them",
        size="14.7 M parameters",
        layout="norm, block1.convs.0.weight, ... block5.projection.bias",
        url="https://huggingface.co/lllyasviel/Annotators/resolve/main/ControlNetHED.pth",
        repo="lllyasviel/Annotators",
    ),
    "lineart": WeightsFile(
        files=("model.pth", "sk_model.pth"),
        what="line drawings (informative-drawings)",
        size="4.3 M parameters",
        layout="model0.1.weight, ... model4.1.bias",
        url="https://huggingface.co/spaces/awacke1/Image-to-Line-Drawings/resolve/main/model.pth",
        repo="lllyasviel/Annotators",  # as sk_model.pth
    ),
    "dinov2-vitl14": WeightsFile(
        files=("dinov2_vitl14_pretrain.pth",),
        what="DINOv2 ViT-L/14",
        size="1.2 GB",
        layout="cls_token, pos_embed (1, 1370, 1024), blocks.0 ... blocks.23",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    ),
    "dinov2-vitb14": WeightsFile(
        files=("dinov2_vitb14_pretrain.pth",),
        what="DINOv2 ViT-B/14",
        size="330 MB",
        layout="cls_token, pos_embed (1, 1370, 768), blocks.0 ... blocks.11",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
}


def places(spec: WeightsFile, name: str) -> Iterator[Path]:
    """Where a file may lie, best first; the Hugging Face cache last."""
    import torch

    folders = [Path(f).expanduser() for f in (os.environ.get(FOLDER_VARIABLE),) if f]
    for folder in [*folders, Path(torch.hub.get_dir()) / "checkpoints"]:
        yield from (folder / file for file in spec.files)
    if spec.repo:
        from huggingface_hub import try_to_load_from_cache

        for file in (*spec.files, Path(spec.url.split("/resolve/")[-1].split("/", 1)[-1]).as_posix()):
            if isinstance(found := try_to_load_from_cache(spec.repo, file), str):
                yield Path(found)


def find_weights(name: str, given: str | Path | None = None, *, download: bool = False) -> Path:
    """The weights file of a network that `KNOWN` lists.

    Args:
        given: the file itself, or a folder that holds it; None looks into the folder of VARKIT_WEIGHTS, the torch hub
            cache and the Hugging Face cache.
        download: fetch it into the torch hub cache where it is nowhere else and its checksum is known.
    Raises: FileNotFoundError saying which file to fetch from where and where to put it; ValueError for a download
        whose checksum is wrong.
    """
    import torch

    spec = KNOWN[name]
    if given is not None:
        path = Path(given).expanduser()
        candidates = [path / file for file in spec.files] if path.is_dir() else [path]
    else:
        candidates = list(places(spec, name))
    for path in candidates:
        if path.is_file():
            return path
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if download and given is None and spec.sha256:
        return _fetched(spec, cache)
    why = " (its checksum is not known here, so it is not downloaded)" if download and not spec.sha256 else ""
    offer = ", or ask for the download (--download)" if spec.sha256 and not download and given is None else ""
    where = (
        f"looked for {given}"
        if given is not None
        else f"not in {', '.join(sorted({str(p.parent) for p in candidates}))}"
    )
    raise FileNotFoundError(
        f"no weights of {spec.what}: {where}. Fetch {spec.files[0]} ({spec.size}; keys {spec.layout}) from {spec.url}"
        f"{why} and put it in {cache} or in the folder that {FOLDER_VARIABLE} names, or give its path (--weights)"
        f"{offer}."
    )


def _fetched(spec: WeightsFile, folder: Path) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / spec.files[0]
    part = path.with_name(f".{path.name}.part")
    torch.hub.download_url_to_file(spec.url, str(part), progress=True)
    if not file_hash(part).startswith(spec.sha256):
        part.unlink()
        raise ValueError(f"{spec.url} gave a file whose SHA-256 does not begin with {spec.sha256}; it was not kept")
    os.replace(part, path)
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
