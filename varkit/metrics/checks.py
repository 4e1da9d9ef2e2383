"""What is refused before any image goes through a network."""

from __future__ import annotations

from varkit.metrics.networks import FeatureNetwork
from varkit.metrics.protocol import Protocol
from varkit.metrics.reference import Reference, about_of
from varkit.metrics.report import differences
from varkit.metrics.scores import NEED_FEATURES
from varkit.metrics.sets import ImageSet


def check_images(
    images: ImageSet,
    reference: ImageSet | Reference,
    protocol: Protocol,
    network: FeatureNetwork | None,
    judge: FeatureNetwork | None,
) -> None:
    """A set beside the protocol and the reference. Raises: ValueError saying what was given, and what is allowed."""
    num, name = protocol.sampling.num, protocol.name
    if len(images) != num:
        raise ValueError(
            f"{images.source} holds {len(images):,} images, the protocol {name} scores {num:,}. A score depends on the "
            f"number: bring {num:,} images, or say --num {len(images)}, and the report will say so too"
        )
    sizes = protocol.images.sizes
    if sizes and images.size not in sizes:
        allowed = ", ".join(f"{h}x{w}" for h, w in sizes)
        raise ValueError(f"{images.source}: images are {_by(images)}; the protocol {name} takes {allowed}")
    real = reference.images if isinstance(reference, Reference) else reference
    if real is not None:
        if real.size != images.size:
            raise ValueError(
                f"{images.source}: images are {_by(images)}, those of the reference {real.source} {_by(real)}; scores "
                "of two sizes say little. Resize one of them, or use a protocol with images.fit"
            )
        if None not in (real.grey, images.grey) and real.grey != images.grey:
            grey, colour = (real, images) if real.grey else (images, real)
            raise ValueError(
                f"{grey.source} is grey, {colour.source} in colour: such a score compares colour, not quality. Was one "
                "of them converted on the way?"
            )
    _check_counts(images, real, protocol)
    if "clip-score" in protocol.metrics and images.texts is None:
        raise ValueError(
            f"{images.source} has no texts: clip-score needs a text for every image, from metadata.jsonl, tars or hf:"
        )
    if judge is not None and images.labels is not None and judge.classes is not None:
        top = int(images.labels.max())
        if top >= judge.classes:
            raise ValueError(f"{images.source} has class {top}, but {judge.what} knows {judge.classes} classes")


def _check_counts(images: ImageSet, real: ImageSet | None, protocol: Protocol) -> None:
    """That there are enough images for what is asked of them."""
    asked = set(protocol.metrics)
    least = 2
    why = "a covariance needs two images"
    if asked & {"precision", "recall", "density", "coverage"} and protocol.manifold.k + 1 > least:
        least, why = protocol.manifold.k + 1, f"manifold.k is {protocol.manifold.k}"
    if "score" in asked and protocol.score.splits is not None and protocol.score.splits > least:
        least, why = protocol.score.splits, f"score.splits is {protocol.score.splits}"
    if "kernel" in asked and protocol.kernel.subsets is not None and protocol.kernel.subset_size > least:
        least, why = protocol.kernel.subset_size, f"kernel.subset_size is {protocol.kernel.subset_size}"
    for one in (images, real):
        if one is not None and len(one) < least:
            raise ValueError(f"{one.source} holds {len(one)} images, and at least {least} are needed: {why}")


def check_statistics(reference: Reference, protocol: Protocol, network: FeatureNetwork) -> None:
    """A file of statistics beside the protocol. Raises: ValueError for moments or features it lacks, or of others."""
    asked = set(protocol.metrics)
    if asked & {"frechet", "infinity"} and "features" not in reference.gaussians:
        raise ValueError(f"{reference.source} holds no mu and sigma")
    if "spatial" in asked and "spatial" not in reference.gaussians:
        raise ValueError(f"{reference.source} holds no mu_s and sigma_s, which spatial (sFID) needs; leave it out")
    if (need := sorted(asked & NEED_FEATURES)) and reference.features is None and reference.images is None:
        raise ValueError(
            f"{reference.source} holds moments alone; {', '.join(need)} compare single real images. Leave them out "
            "(--metrics), or give the images, or statistics that eval/prepare_reference.py made of them"
        )
    if reference.about:
        found = differences(reference.about, about_of(protocol, network))
        if found:
            raise ValueError(
                f"{reference.source} was made otherwise than the protocol {protocol.name}: {'; '.join(found)}"
            )
    width = len(reference.gaussians["features"].mean) if "features" in reference.gaussians else None
    if width is not None and network.dim is not None and width != network.dim:
        raise ValueError(
            f"{reference.source} is of {width} features, the network {network.name} has {network.dim}: they were made "
            "by another network"
        )


def _by(images: ImageSet) -> str:
    return "x".join(map(str, images.size))
