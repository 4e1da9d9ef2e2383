"""What the tabs share: models on offer, checks of what a visitor sends, and errors in words."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varkit.demo.limits import Limits
from varkit.demo.running import Turns
from varkit.metrics.reconstruction import takes_lengths

logger = logging.getLogger(__name__)

MAX_SEED = 2**31 - 1
MAX_TEMPERATURE = 5.0
MAX_PROMPT = 1000  # characters
SHOWN_SIDE = 384  # small images are enlarged to about this many pixels a side
PATH = re.compile(r"(?:^|[\s'\"(\[=])(?:~|[A-Za-z]:)?[\\/]\w")
"""What may be a path of the server; no visitor reads a message that matches."""


def need_gradio() -> Any:
    """The gradio module, told to send no statistics. Raises ImportError naming the extra."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'the demo needs gradio: pip install "varkit[app]" ({error})') from None
    return gradio


@dataclass(frozen=True)
class Takes:
    """What a model is asked with.   text: prompts; else classes.   control: control images.   always: never without.

    clips: it draws clips, not images.
    """

    text: bool
    control: bool
    always: bool
    clips: bool = False


class Models:
    """The models a visitor may choose: each is opened on first use and kept.

    Args:
        sources: what `AutoPipeline` opens: shipped names, folders, checkpoints. The visitor sends only short names,
            so no path ever comes from a browser.
        limits: how much a visitor may ask for.
    Raises: ValueError when there is no source.
    """

    def __init__(self, sources: Sequence[str | Path], limits: Limits | None = None) -> None:
        self.limits, self.turns = limits or Limits(), Turns()
        self.sources: dict[str, str] = {}
        for source in dict.fromkeys(str(s) for s in sources):
            name = base = Path(source).name or source
            number = 2
            while name in self.sources:
                name, number = f"{base} ({number})", number + 1
            self.sources[name] = source
        if not self.sources:
            raise ValueError("no model ships with this copy of varkit; name a saved pipeline folder to show")
        self._open: dict[str, Any] = {}
        self._examples: dict[str, list[Image.Image]] = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    def source(self, name: str) -> str:
        """What the command line calls the model. Raises ValueError when it is not on offer."""
        if name not in self.sources:
            raise ValueError(f"that model is not on offer; choose one of {', '.join(self.names)}")
        return self.sources[name]

    def only(self, names: Sequence[str]) -> Models:
        """Some of these models, opened with the others and in turn with them."""
        some = copy.copy(self)
        some.sources = {name: self.source(name) for name in names}
        return some

    def takes(self, name: str) -> Takes:
        """What the model is asked with; of a folder its configuration says it, any other model is opened."""
        from varkit.pipelines.auto import find_folder

        folder = find_folder(self.source(name))
        if folder is not None and (part := folder / "transformer" / "config.json").is_file():
            config = json.loads(part.read_text(encoding="utf-8"))
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            text = index.get("_class_name") == "TextToImagePipeline"
            clips = index.get("_class_name") == "ClassToVideoPipeline"
        else:
            pipeline = self.open(name)
            config, text = pipeline.transformer.config, pipeline.transformer.condition == "text"
            clips = pipeline.image_tokenizer.num_frames is not None
        if clips:
            return Takes(text=False, control=False, always=False, clips=True)
        control = config.get("control") is not None
        return Takes(text, control, control and not config.get("control_drop_rate"))

    def open(self, name: str) -> Any:
        """The pipeline, on the best device, loaded once."""
        from varkit.pipelines.auto import AutoPipeline, best_device

        source = self.source(name)
        with self._lock:
            if name not in self._open:
                pipeline = AutoPipeline.from_pretrained(source).to(best_device())
                pipeline.set_progress_bar_config(disable=True)
                self._open[name] = pipeline
            return self._open[name]

    def examples(self, name: str, count: int = 6) -> list[Image.Image]:
        """A few images drawn by the model itself, made once; none where that would take minutes."""
        pipeline = self.open(name)
        with self.turns.take():
            if name not in self._examples:
                weights = sum(p.numel() for p in pipeline.transformer.parameters())
                slow = weights > 100e6 and pipeline.device.type == "cpu"
                labels = [i % pipeline.transformer.num_classes for i in range(count)]
                self._examples[name] = [] if slow else [enlarge(i) for i in pipeline(labels, seed=0).images]
            return self._examples[name]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Whatever goes wrong reaches the visitor as one sentence; surprises are logged with their traceback."""
    gr = need_gradio()
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError | TypeError) or PATH.search(text):
            logger.exception("a request failed")
            text = "This request failed on the server; its log says why. Another model or smaller number may work."
        raise gr.Error(text[:1].upper() + text[1:], print_exception=False) from None


def number(what: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high], to four decimals. Raises ValueError naming `what`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{what} must be a number from {low:g} to {high:g}; got {str(value)[:40]}")
    return round(float(value), 4)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """`value` as an int in [low, high]. Raises ValueError naming `what`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value % 1:
        raise ValueError(f"{what} must be a whole number from {low} to {high}; got {str(value)[:40]}")
    return int(value)


def new_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def check_seed(value: Any) -> int:
    return whole("Seed", value, 0, MAX_SEED)


def factor(width: int, height: int) -> int:
    """How many times an image is enlarged to be seen well."""
    return max(1, SHOWN_SIDE // max(width, height))


def enlarge(image: Image.Image) -> Image.Image:
    """Small images by a whole factor, each pixel a square; large ones as they are."""
    k = factor(*image.size)
    return image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST) if k > 1 else image


def is_flexible(pipeline: Any) -> bool:
    """Whether any number of the first tokens is an image, and can be asked for."""
    return takes_lengths(pipeline.image_tokenizer) and "num_tokens" in pipeline.sampler.settings()


def stages(pipeline: Any) -> dict[int, str]:
    """Numbers of first tokens that alone can be shown as an image, with captions: those of the first scales, or 1, 2,
    4, ... of a tokenizer of flexible length. Empty for other models."""
    tokenizer = pipeline.image_tokenizer
    layout = tokenizer.layout
    if takes_lengths(tokenizer):
        powers = {2**i for i in range(layout.length.bit_length())} | {layout.length}
        return {n: "1 token" if n == 1 else f"{n} tokens" for n in sorted(powers)}
    if len(layout.grids) > 1:
        return {part.stop: " x ".join(map(str, grid)) for grid, part in zip(layout.grids, layout.slices, strict=True)}
    return {}


def class_name(pipeline: Any, label: int) -> str:
    return pipeline.labels.get(label, f"class {label}")


def class_choices(pipeline: Any) -> list[tuple[str, str]]:
    """(what the visitor reads, what is sent) for each class."""
    names = pipeline.labels
    return [
        (f"{i} · {names[i]}" if i in names else f"class {i}", str(i)) for i in range(pipeline.transformer.num_classes)
    ]


def check_class(pipeline: Any, choice: Any) -> int:
    """A class id or name as an id. Raises ValueError."""
    (label,) = pipeline.label_ids([str(choice)[:80]])
    return whole("Class", label, 0, pipeline.transformer.num_classes - 1)


def check_prompt(value: Any) -> str:
    """A prompt of any script, without the space around it. Raises ValueError on an empty or a too long one."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError("write first what is to be drawn: the prompt is empty")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(text)} characters; write at most {MAX_PROMPT}")
    return text


# ---------------------------------------------------------------- sampling settings

SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p", "more_smooth", "num_tokens")
"""In the order of the controls, which is the order in which handlers receive them."""


def defaults(pipeline: Any) -> dict[str, Any]:
    """Of the controls; what a sampler does not know is off: smoothing, and of latents the filters of logits."""
    known = {k: v for k, v in pipeline.sampler.settings().items() if k in SETTINGS and v is not None}
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "more_smooth": False}
    return {**off, "num_tokens": pipeline.image_tokenizer.layout.length, **known}


def _most_k(pipeline: Any) -> int:
    size = pipeline.image_tokenizer.layout.codebook_size
    return size if isinstance(size, int) else 65536


def check_settings(pipeline: Any, values: Sequence[Any]) -> dict[str, Any]:
    """The values of the sampling controls as arguments of a pipeline call. Raises ValueError."""
    guidance, temperature, top_k, top_p, more_smooth, num_tokens = values
    settings = {
        "guidance_scale": number("Guidance", guidance, 0, 100),
        "temperature": number("Temperature", temperature, 0.01, MAX_TEMPERATURE),
        "top_k": whole("Top-k", top_k, 0, _most_k(pipeline)),
        "top_p": number("Top-p", top_p, 0.01, 1),
        "more_smooth": bool(more_smooth),
    }
    if is_flexible(pipeline):
        settings["num_tokens"] = whole("Tokens", num_tokens, 1, pipeline.image_tokenizer.layout.length)
    return {k: v for k, v in settings.items() if k in pipeline.sampler.settings()}


def setting_updates(pipeline: Any) -> list[dict[str, Any]]:
    """Properties of the six controls that depend on the model, in the order of `SETTINGS`. What its sampler does not
    know is not shown."""
    default, known = defaults(pipeline), pipeline.sampler.settings()
    return [
        {"value": default["guidance_scale"], "maximum": max(5.0, default["guidance_scale"])},
        {"value": default["temperature"], "maximum": max(2.0, default["temperature"])},
        {"value": default["top_k"], "maximum": _most_k(pipeline), "visible": "top_k" in known},
        {"value": default["top_p"], "visible": "top_p" in known},
        {"value": default["more_smooth"], "visible": "more_smooth" in known},
        {
            "value": default["num_tokens"],
            "maximum": pipeline.image_tokenizer.layout.length,
            "visible": is_flexible(pipeline),
        },
    ]
