"""Opening a pipeline by name, folder, hub repository or released file."""

from __future__ import annotations

import json
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch

from varkit import registry
from varkit.config import nearest
from varkit.hub import download, is_hub_id
from varkit.interfaces import Tokenizer
from varkit.tokenizers.frames import FrameTokenizer

ZOO = Path(__file__).resolve().parent.parent / "zoo"

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments of `AutoPipeline.from_pretrained` that concern the hub alone."""

PIPELINES = {
    "ClassToImagePipeline": "varkit.pipelines.class_to_image",
    "ClassToVideoPipeline": "varkit.pipelines.class_to_video",
    "DistilledPipeline": "varkit.pipelines.distilled",
    "TextToImagePipeline": "varkit.pipelines.text_to_image",
}

OF_DIFFUSERS = {"AutoencoderKL": "KLVAE"}
"""Classes of diffusers that a folder may hold -> ours that open it."""

SAMPLERS = {
    "NextGroupSampler": "varkit.samplers.next_group",
    "MaskedSampler": "varkit.samplers.masked",
    "ContinuousSampler": "varkit.samplers.continuous",
    "DistilledSampler": "varkit.samplers.distilled",
    "EnergySampler": "varkit.samplers.energy",
    "SpeculativeSampler": "varkit.samplers.speculative.sampler",
    "ContinuousSpeculativeSampler": "varkit.samplers.continuous_speculative",
    "ZipARSampler": "varkit.samplers.zipar",
}


def zoo_models() -> list[str]:
    """Names of the models that ship with varkit."""
    return sorted(p.parent.name for p in ZOO.glob("*/model_index.json"))


def best_device() -> torch.device:
    """CUDA, else MPS, else the CPU: the one place where varkit chooses."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def find_folder(name: str | Path) -> Path | None:
    """The folder of a shipped model or a saved pipeline; None when `name` is neither."""
    for folder in (ZOO / str(name), Path(name)):
        if (folder / "model_index.json").is_file():
            return folder
    return None


class AutoPipeline:
    """`AutoPipeline.from_pretrained(...)` opens any varkit pipeline and returns its own class."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **kwargs: Any) -> Any:
        """Open a pipeline.

        Args:
            name_or_path: a shipped model (`fashion-var`), a saved folder, a released checkpoint
                (`var_d16.in1k_256`, downloaded from the hub) or a hub repository (`user/name`).
            kwargs: those of `DiffusionPipeline.from_pretrained`, such as `dtype`; for the hub also `revision`,
                `token`, `cache_dir`, `local_files_only`, `force_download`.
        Raises: ValueError naming what exists when nothing answers to the name.
        """
        name = str(name_or_path)
        folder = find_folder(name)
        if folder is None:
            if name in registry.list_checkpoints():
                return _from_checkpoint(registry.checkpoint(name), kwargs.get("dtype") or kwargs.get("torch_dtype"))
            folder = _from_hub(name, **{k: kwargs.pop(k) for k in HUB_OPTIONS if k in kwargs})
            if not (folder / "model_index.json").is_file():
                raise ValueError(f"hub repository {name!r} holds no pipeline (model_index.json); open it by its class")
        index = json.loads((folder / "model_index.json").read_text())
        kind = index.get("_class_name")
        if kind not in PIPELINES:
            raise ValueError(f"{folder} holds a {kind}; varkit opens {', '.join(PIPELINES)}")
        cls = getattr(import_module(PIPELINES[kind]), kind)
        return cls.from_pretrained(str(folder), **kwargs)

    @staticmethod
    def from_single_file(transformer: str | Path, image_tokenizer: str | Path, **sampling: Any) -> Any:
        """A pipeline from two released files, such as `var_d16.pth` and `vae_ch160v4096z32.pth`.

        Args: sampling: settings of the generator's sampler to use as defaults.
        """
        from varkit.checkpoints.files import load_official

        model: Any = load_official(transformer)
        return assemble(model, load_official_tokenizer(image_tokenizer, model), sampling)


def load_official_tokenizer(path: str | Path, generator: Any) -> Any:
    """The tokenizer of a released file, cut for the images that `generator` was made for.

    A convolutional tokenizer's file does not say the size of its images, nor how its bits are cut into sub-codes: the
    generator's layout does.
    """
    from varkit.checkpoints.files import build_official, read_state_dict
    from varkit.checkpoints.formats import format_of_state

    state = read_state_dict(path)
    taken = signature(format_of_state(state, str(path)).model_class().__init__).parameters
    names = [n for n in ("scales", "grid", "sub_codes") if n in generator.config and n in taken]
    return build_official(state, str(path), **{n: generator.config[n] for n in names})


def open_tokenizer(name: str, *, image_size: int | None = None, num_frames: int | None = None, **overrides: Any) -> Any:
    """The tokenizer of a shipped model or pipeline, a tokenizer's folder, a released checkpoint or its file, or of a
    hub repository (`user/name`) that holds a pipeline or a tokenizer. An `AutoencoderKL` of diffusers is one too, also
    in the folder `vae` of its pipeline (on the hub `user/name/vae`).

    Args:
        image_size: side of the images that it is to code, where it can code several.
        num_frames: of clips: a tokenizer of images codes each frame by itself (`FrameTokenizer`).
        overrides: constructor arguments to use instead of the saved ones; the weights must fit.
    Raises: ValueError when `name` is none of them, codes images of another size alone, or clips of other lengths.
    """
    found = _open_part(name, "image_tokenizer", Tokenizer, overrides)
    if found is None:
        raise ValueError(
            f"no tokenizer at {name!r}: give a shipped model, a folder with config.json (such as the model/ folder of "
            f"a tokenizer run), a released checkpoint such as multiscale_vq_f16.openimages, or its file"
        )
    tokenizer: Any = found[0]
    if num_frames is not None and tokenizer.num_frames not in (None, num_frames):
        tokenizer = _of_frames(name, tokenizer, num_frames, overrides)
    if image_size is not None and tokenizer.image_size != (image_size, image_size):
        if not hasattr(tokenizer, "set_image_size"):
            height, width = tokenizer.image_size
            raise ValueError(f"{name} codes images of {height}x{width} alone, not of {image_size}x{image_size}")
        tokenizer.set_image_size(image_size)
    if num_frames is not None and tokenizer.num_frames is None:
        return FrameTokenizer.around(tokenizer, num_frames)
    return tokenizer


def _of_frames(name: str, tokenizer: Any, num_frames: int, overrides: dict[str, Any]) -> Any:
    """A tokenizer of clips opened anew for those of so many frames. Raises ValueError where it codes no others."""
    if "num_frames" not in getattr(tokenizer, "free_arguments", ()):
        raise ValueError(f"{name} codes clips of {tokenizer.num_frames} frames alone, not of {num_frames}")
    try:
        found: Any = _open_part(name, "image_tokenizer", Tokenizer, overrides | {"num_frames": num_frames})
    except ValueError as error:
        raise ValueError(f"{name} cannot code clips of {num_frames} frames: {error}") from error
    return found[0]


def tokenizer_frames(name: str) -> int | None:
    """Frames of the clips that the tokenizer of that name codes, None for one of images; weights of folders are not
    read.

    Raises: as `open_tokenizer`.
    """
    if name in registry.list_checkpoints():
        with torch.device("meta"):
            return getattr(registry.model_entry(registry.checkpoint(name).builder).build(), "num_frames", None)
    folder = find_folder(name)
    folder = Path(name) if folder is None else _part_of(folder, "image_tokenizer")
    if not (folder / "config.json").is_file():
        return cast("int | None", open_tokenizer(name).num_frames)
    written = json.loads((folder / "config.json").read_text())
    kind = OF_DIFFUSERS.get(written.get("_class_name", ""), written.get("_class_name", ""))
    try:
        saved = registry.model_class(kind)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if not issubclass(saved, Tokenizer):
        raise ValueError(f"{folder} holds a {saved.__name__}, not a {Tokenizer.__name__}")
    if kind != written["_class_name"]:
        return None
    with torch.device("meta"):
        return cast("int | None", saved.from_config(written).num_frames)  # type: ignore[attr-defined]


def open_transformer(name: str, kind: type[Any], **overrides: Any) -> tuple[Any, dict[int, str]]:
    """The generator of a shipped model or pipeline, a generator's folder, a released checkpoint or its file, or of a
    hub repository (`user/name`) that holds a pipeline or a generator.

    Args:
        kind: the class it must be of, such as `VAR`.
        overrides: constructor arguments to use instead of the saved ones; the weights must fit.
    Returns: the network, and its class names by id: empty when the source names none.
    Raises: ValueError when `name` is none of them, or holds another class.
    """
    found = _open_part(name, "transformer", kind, overrides)
    if found is None:
        names = [n for n in registry.list_checkpoints() if registry.checkpoint(n).tokenizer]
        alike = [n for n in names if n.startswith(kind.__name__.lower())]
        released = next(iter(alike or names), "none")
        raise ValueError(
            f"no generator at {name!r}: give a shipped model, a folder with model_index.json or config.json (such as "
            f"the model/ folder of a run), a released checkpoint such as {released}, or its file"
        )
    return found


def open_drafter(name: str, target: Any, **overrides: Any) -> Any:
    """The EAGLE drafter of a generator: a folder (such as the model/ folder of a run of objective `eagle`), a released
    checkpoint or its file, or a hub repository.

    Args:
        target: the generator whose states it reads.
        overrides: constructor arguments to use instead of the saved ones, such as `grid` of a renamed released file.
    Raises: ValueError when `name` is none of them, or the drafter was made for another generator.
    """
    from varkit.generators.eagle import Eagle

    if name in registry.list_checkpoints():
        overrides = {**registry.checkpoint(name).overrides, **overrides}
    found = _open_part(name, "drafter", Eagle, overrides)
    if found is None:
        raise ValueError(
            f"no drafter at {name!r}: give a folder with config.json (such as the model/ folder of a run of objective "
            f"eagle), a released checkpoint such as {registry.list_checkpoints('eagle_*')[0]}, or its file"
        )
    drafter: Any = found[0].eval()
    drafter.require(target)
    return drafter


def _open_part(name: str, part: str, kind: type[Any], overrides: dict[str, Any]) -> tuple[Any, dict[int, str]] | None:
    """One part of a model of any form, and its class names; None when nothing is at `name`."""
    if name in registry.list_checkpoints():
        name = _download(registry.checkpoint(name))
    elif name.endswith("/vae") and is_hub_id(name.removesuffix("/vae")):
        name = str(download(name.removesuffix("/vae"), folder="vae") / "vae")
    elif is_hub_id(name) and not name.endswith((".pth", ".bin", ".safetensors")):
        name = str(download(name))
    folder, labels = find_folder(name), dict[int, str]()
    if folder is not None:
        names = json.loads((folder / "model_index.json").read_text()).get("id2label") or {}
        labels, folder = {int(k): v for k, v in names.items()}, _part_of(folder, part)
    elif (Path(name) / "config.json").is_file():
        folder = Path(name)
    if folder is not None:
        written = json.loads((folder / "config.json").read_text()).get("_class_name", "")
        try:
            saved = registry.model_class(OF_DIFFUSERS.get(written, written))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        if not issubclass(saved, kind):
            raise ValueError(f"{folder} holds a {saved.__name__}, not a {kind.__name__}")
        return saved.from_pretrained(folder, **overrides), labels
    if not Path(name).is_file():
        return None
    from varkit.checkpoints.files import load_official

    model: Any = load_official(name)
    if not isinstance(model, kind):
        raise ValueError(f"{name} holds a {type(model).__name__}, not a {kind.__name__}")
    return (load_official(name, **overrides) if overrides else model), labels


def _part_of(pipeline: Path, part: str) -> Path:
    """The folder of a pipeline's part; the VAE of a pipeline of diffusers is its tokenizer. Raises ValueError."""
    for name in (part, "vae") if part == "image_tokenizer" else (part,):
        if (pipeline / name / "config.json").is_file():
            return pipeline / name
    kind = json.loads((pipeline / "model_index.json").read_text()).get("_class_name")
    raise ValueError(f"{pipeline} holds a {kind}, which has no {part}")


def create_pipeline(name: str, **overrides: Any) -> Any:
    """A pipeline around the builder `name` with fresh, untrained weights, for benchmarks and tests.

    Args: overrides: constructor arguments of the generator.
    """
    entry = registry.model_entry(name)
    if entry.kind == "tokenizer" or entry.tokenizer is None:
        raise ValueError(f"{name} is a {entry.kind}; a pipeline is built around a generator")
    tokenizer = registry.create_model(entry.tokenizer)
    return assemble(entry.build(**overrides).eval(), tokenizer.eval(), {})


def assemble(transformer: Any, tokenizer: Any, sampling: dict[str, Any]) -> Any:
    """A pipeline of its own kind around a generator or a student, of images or, by the tokenizer, of clips.

    Args: sampling: settings of the sampler that the generator names.
    """
    from varkit.generators.distilled import Student
    from varkit.pipelines.class_to_image import ClassToImagePipeline
    from varkit.pipelines.class_to_video import ClassToVideoPipeline
    from varkit.pipelines.distilled import DistilledPipeline
    from varkit.pipelines.text_to_image import TextToImagePipeline

    sampler = getattr(import_module(SAMPLERS[transformer.sampler]), transformer.sampler)
    tokenizer = transformer.tokenizer_for(tokenizer)
    kind = TextToImagePipeline if transformer.condition == "text" else ClassToImagePipeline
    if isinstance(transformer, Student):
        kind = DistilledPipeline
    elif tokenizer.num_frames is not None:
        kind = ClassToVideoPipeline
    return kind(transformer, tokenizer, sampler(**sampling))


def _download(card: registry.Checkpoint) -> str:
    """The released file, from the hub or its cache. Raises ValueError when neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(card.repo_id, card.filename)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{card.repo_id}/{card.filename} cannot be downloaded: {error}. With the file at hand, use `varkit convert`"
        ) from None


def _from_checkpoint(card: registry.Checkpoint, dtype: torch.dtype | None) -> Any:
    if card.tokenizer is None:
        raise ValueError(f"{card.name} is a tokenizer, not a pipeline; `varkit reconstruct` and open_tokenizer take it")
    pipeline = AutoPipeline.from_single_file(
        _download(card), _download(registry.checkpoint(card.tokenizer)), **card.sampling
    )
    return pipeline.to(dtype) if dtype is not None else pipeline


def _from_hub(name: str, **options: Any) -> Path:
    if not is_hub_id(name):
        if name in registry.list_models():
            checkpoints = ", ".join(registry.list_checkpoints(name + ".*")) or "none known"
            raise ValueError(
                f"{name} is an architecture without weights; train it, convert a released file with "
                f"`varkit convert`, or open a checkpoint of it: {checkpoints}"
            )
        known = [*zoo_models(), *registry.list_checkpoints()]
        raise ValueError(
            f"{name!r} is neither a shipped model, nor a folder with model_index.json, nor a released checkpoint"
            f"{nearest(name, known)}. Shipped: {', '.join(zoo_models()) or 'none'}; `varkit list` shows the rest"
        )
    return download(name, **options)
