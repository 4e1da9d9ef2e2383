"""A protocol: everything that a score depends on besides the images, as one checked YAML file.

Tools that score the same images differ by several points, by their resize, scaling, network, statistics and counts.
So a number is printed with its protocol, and numbers of two protocols are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from varkit.config import ConfigError, build, config, load_yaml, nearest, override, to_dict
from varkit.pictures import UInt8Rule

Network = Literal[
    "inception",
    "classifier",
    "effnet-lite0",
    "dinov2-vitl14",
    "dinov2-vitb14",
    "clip-vit-b32",
    "i3d",
    "videomae",
    "moving-fashion",
]
VIDEO_NETWORKS = ("i3d", "videomae", "moving-fashion")
Float = Literal["float32", "float64"]

METRICS: dict[str, dict[str, str]] = {
    "images": {
        "frechet": "Frechet distance of the features (FID with Inception, FDD with DINOv2)",
        "spatial": "Frechet distance of Inception's spatial features (sFID)",
        "score": "inception score (IS)",
        "kernel": "kernel distance (KID)",
        "precision": "share of generated images on the real manifold",
        "recall": "share of real images on the generated manifold",
        "density": "real balls around a generated image",
        "coverage": "share of real images with a generated one in their ball",
        "infinity": "the Frechet distance extrapolated to infinitely many images",
        "accuracy": "share of images that a classifier puts in the class they were made for",
        "neighbours": "how near the nearest training images are (memorisation)",
        "clip-score": "cosine of image and text",
    },
    "reconstruction": {
        "frechet": "Frechet distance of reconstructions to originals (rFID)",
        "psnr": "peak signal-to-noise ratio",
        "ssim": "structural similarity",
        "ms-ssim": "structural similarity at five scales",
        "lpips-alex": "LPIPS on AlexNet",
        "lpips-vgg": "LPIPS on VGG-16",
        "lpips-squeeze": "LPIPS on SqueezeNet",
        "codebook": "use of the codebook, scale by scale",
    },
    "video-reconstruction": {
        "frechet": "Frechet distance of reconstructed clips to originals (rFVD with I3D)",
        "psnr": "peak signal-to-noise ratio of whole clips",
        "ssim": "structural similarity, mean over frames",
        "lpips-alex": "LPIPS on AlexNet, mean over frames",
        "lpips-vgg": "LPIPS on VGG-16, mean over frames",
        "lpips-squeeze": "LPIPS on SqueezeNet, mean over frames",
        "codebook": "use of the codebook",
    },
    "videos": {
        "frechet": "Frechet distance of the features of clips (FVD with I3D)",
        "kernel": "kernel distance of the features of clips",
        "accuracy": "share of clips that a classifier of clips puts in the class they were made for",
    },
}
"""Kind of protocol -> metric -> what it is."""

USUAL_NAMES = {
    "fid": "frechet",
    "fdd": "frechet",
    "fvd": "frechet",
    "rfid": "frechet",
    "rfvd": "frechet",
    "sfid": "spatial",
} | {
    "is": "score",
    "inception-score": "score",
    "kid": "kernel",
    "fid-infinity": "infinity",
    "memorisation": "neighbours",
}
"""Names that people type -> metric."""


@config
class ResizeRule:
    """How pixels get the network's size; see `varkit.metrics.resize.resize`."""

    method: Literal["bilinear", "bicubic"] = "bilinear"
    sampling: Literal["tf1", "half_pixel", "pil"] = "tf1"
    antialias: bool = False
    dtype: Literal["float32", "uint8"] = "float32"
    clip: tuple[float, float] | None = None


@config
class NetworkRule:
    """The feature network and its input. `resize` and `scaling` are Inception's; the others have one way each."""

    name: Network = "inception"
    resize: ResizeRule = ResizeRule()
    scaling: Literal["(x-128)/128", "x/127.5-1"] = "(x-128)/128"
    dtype: Float = "float32"  # of the network


@config
class ImageRule:
    """What the images must be."""

    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) allowed; empty: any, the same for all
    fit: Literal["none", "center", "squash", "pad"] = "none"  # how real images get the size of the generated ones
    quantise: UInt8Rule = "round"  # how floats become 8 bits: a rule of varkit.pictures.to_uint8
    frames: Literal["", "first", "all"] = ""  # videos are scored as images: their first frame, or every frame


@config
class SamplingRule:
    """The images to be scored, and how a model is sampled for it."""

    num: int = 50000
    labels: Literal["cycled", "balanced", "random", "reference"] = "cycled"  # reference: of the real clips, in turn
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ConfigError(f"sampling.num must be at least 2; got {self.num}")


@config
class FrechetRule:
    ddof: Literal[0, 1] = 1  # covariance over N - 1, or over N
    mean_dtype: Float = "float64"
    dtype: Float = "float64"


@config
class ScoreRule:
    splits: int | None = 10
    split_size: int | None = None  # consecutive blocks instead of splits
    shuffle: int | None = 2020  # seed of a permutation taken first
    dtype: Float = "float64"
    eps: float = 0.0


@config
class KernelRule:
    subsets: int | None = 100  # None: all samples at once, without randomness
    subset_size: int = 1000
    seed: int = 2020


@config
class ManifoldRule:
    k: int = 3
    comparison: Literal["inclusive", "strict"] = "inclusive"
    real: int = 10000  # real images, drawn at random where there are more
    generated: int | None = None  # generated images, the first; None: all


@config
class InfinityRule:
    points: int = 15  # sizes, evenly spaced
    least: int = 5000  # smallest size, if there are enough images; else a tenth of them
    seed: int = 0


@config
class ClipRules:
    """How a clip is cut out of a video, and what the network is given."""

    frames: int = 16
    stride: int = 1
    stride_real: int | None = None  # of real videos, where these have more frames a second; None: stride
    start_real: Literal["first", "middle", "random", "all"] = "random"  # all: windows side by side
    start_generated: Literal["first", "random"] = "first"
    given: int = 0  # first frames of real clips that a model is given; it draws them too, and they are scored
    short: Literal["refuse", "skip"] = "refuse"
    seed: int = 0
    real: int | None = None  # real videos, drawn at random where there are more; None: all
    load_size: int | None = None  # side of clips when read; None: as stored
    load: Literal["cover", "squash"] = "cover"  # to it: shorter side and centre crop, or the aspect ratio not kept
    score_size: int | None = None  # side that real and generated clips are brought to before the network's own
    method: Literal["direct", "short_side_crop"] = "direct"  # to the network's size
    quantise: Literal["none", "truncate"] = "none"
    norm_eps: float = 1e-5  # of I3D's batch norms

    def __post_init__(self) -> None:
        if not 0 <= self.given < self.frames:
            raise ConfigError(f"clips.given must be below clips.frames, {self.frames}; got {self.given}")


@config
class IntervalRule:
    """Percentiles of the bootstrap distribution; the reference is held fixed."""

    level: float = 0.95
    resamples: int = 1000
    seed: int = 0


@config
class Protocol:
    """How a set of images, reconstructions or videos is scored."""

    name: str
    summary: str
    source: str  # the paper, repository or file this follows
    kind: Literal["images", "reconstruction", "videos", "video-reconstruction"] = "images"
    metrics: tuple[str, ...]
    network: NetworkRule = NetworkRule()
    images: ImageRule = ImageRule()
    sampling: SamplingRule = SamplingRule()
    frechet: FrechetRule = FrechetRule()
    score: ScoreRule = ScoreRule()
    kernel: KernelRule = KernelRule()
    manifold: ManifoldRule = ManifoldRule()
    infinity: InfinityRule = InfinityRule()
    clips: ClipRules = ClipRules()
    interval: IntervalRule | None = IntervalRule()  # null: none, and features are not kept where moments suffice

    def __post_init__(self) -> None:
        allowed = METRICS[self.kind]
        for metric in self.metrics:
            if metric not in allowed:
                raise ConfigError(
                    f"metrics: a protocol for {self.kind} has no {metric!r}{nearest(metric, allowed)}; it has "
                    f"{', '.join(allowed)}"
                )
        if self.kind.startswith("video") != (self.network.name in VIDEO_NETWORKS):
            raise ConfigError(f"network.name: {self.network.name} does not score {self.kind}")
        if self.network.name != "inception" and "spatial" in self.metrics:
            raise ConfigError("metrics: spatial (sFID) is defined for the network inception alone")
        if self.kind == "videos" and "accuracy" in self.metrics and self.network.name != "moving-fashion":
            raise ConfigError(
                f"metrics: accuracy asks a classifier of clips, the network moving-fashion; {self.network.name} is none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that says what the numbers depend on: rules that nothing here uses are left out."""
        data = to_dict(self)
        used = {
            "frechet": {"frechet", "spatial", "infinity"},
            "score": {"score"},
            "kernel": {"kernel"},
            "manifold": {"precision", "recall", "density", "coverage", "neighbours"},
            "infinity": {"infinity"},
        }
        for rule, metrics in used.items():
            if not metrics & set(self.metrics):
                del data[rule]
        if not self.kind.startswith("video") and not self.images.frames:
            del data["clips"]
        if self.network.name != "inception":
            data["network"] = {"name": self.network.name}
        if self.kind.endswith("reconstruction") and "frechet" not in self.metrics:
            del data["network"]  # nothing reads it
        return data


def shipped_protocols() -> dict[str, Path]:
    """Protocols that come with varkit, by name."""
    folder = Path(str(files("varkit"))) / "protocols"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_protocol(
    name: str | Path, overrides: Sequence[str] = (), *, metrics: Sequence[str] = (), num: int | None = None
) -> Protocol:
    """A protocol by name, or from the path of a .yaml file.

    Args:
        overrides: `key=value`, such as `manifold.k=5`.   metrics: instead of those of the file; the usual names
            (`fid`, `is`) are understood.   num: images, instead of `sampling.num`.
    Raises: ConfigError naming the nearest protocol, key or metric.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    else:
        shipped = shipped_protocols()
        if str(name) not in shipped:
            raise ConfigError(
                f"no protocol is called {str(name)!r}{nearest(str(name), shipped)}; there are {', '.join(shipped)}, "
                "or give the path of a .yaml file"
            )
        path = shipped[str(name)]
    values = override(load_yaml(path), overrides)
    if metrics:
        values["metrics"] = [USUAL_NAMES.get(m.strip().lower(), m.strip().lower()) for m in metrics]
    if num is not None:
        values["sampling"] = {**(values.get("sampling") or {}), "num": num}
    return build(Protocol, {"name": path.stem, **values}, source=str(path))
