"""What every pipeline that draws images shares: its output, its randomness, the call of the sampler, editing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from varkit import registry
from varkit.conditioning.control import ControlCondition, Controls, Strength
from varkit.generators.one_token import OneToken
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator
from varkit.layers.packed import can_pack, pack_linears
from varkit.pipelines.auto import SAMPLERS, find_folder, open_drafter, open_tokenizer, open_transformer
from varkit.pipelines.editing import Editing
from varkit.rng import Rng
from varkit.samplers.continuous_speculative import ContinuousSpeculativeSampler
from varkit.samplers.next_group import Known
from varkit.samplers.speculative.names import named_sampler
from varkit.samplers.speculative.sampler import SpeculativeSampler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]


@dataclass
class ImageOutput(BaseOutput):
    """`images`: a list of PIL images; (B, H, W, 3) float in [0, 1]; (B, 3, H, W) in [0, 1]; or tokens.

    `class_labels` of a class pipeline, `prompts` of a text pipeline: one an image; None where there are none.
    `scores`, `chosen` with `best_of`: the probability of the class for every candidate of an image, and which is kept.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    class_labels: list[int] | None
    stats: dict[str, Any]
    prompts: list[str] | None = None
    scores: list[list[float]] | None = None
    chosen: list[int] | None = None


DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
"""What diffusers calls the dtype of weights that it opens; it warns of the older name."""


class ImagePipeline(Editing, HubMixin, DiffusionPipeline):
    """Parts `transformer`, `image_tokenizer` and `sampler`, and the call that a condition leads to."""

    _draft: tuple[Any, Any] | None = None

    @classmethod
    def from_pretrained(
        cls, *args: Any, dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """As in diffusers, which builds only classes of modules that are imported: here are ours, and plug-ins'.

        Args: dtype: of the weights; torch_dtype, its older name, is taken too.
        """
        if (wanted := dtype or torch_dtype) is not None:
            kwargs[DTYPE] = wanted
        registry.list_models()
        for module in SAMPLERS.values():
            import_module(module)
        return super().from_pretrained(*args, **kwargs)

    def optimize_decoding(self, **settings: Any) -> Self:
        """Prepare the transformer for drawing fast, once; images may differ from those before by rounding.

        On CUDA the step of one token becomes a CUDA graph (`OneToken.compile_decoding`), and so it does anywhere with
        `settings` of torch.compile. On a CPU in float32 the weights are repacked (`varkit.layers.packed`), which takes
        a second copy of them.
        Raises: ValueError where there is nothing to prepare.
        """
        transformer = self.transformer
        device, dtype = transformer.device, transformer.dtype
        if device.type == "cpu" and not settings:
            if dtype != torch.float32 or not can_pack():
                raise ValueError(
                    f"on a CPU decoding is prepared by repacking float32 weights with oneDNN; this model is {dtype}, "
                    f"oneDNN {'is' if can_pack() else 'is not'} there. Leave it out, or give settings of torch.compile"
                )
            pack_linears(transformer)
        elif isinstance(transformer, OneToken):
            transformer.compile_decoding(**settings)
        else:
            raise ValueError(
                f"{type(transformer).__name__} does not decide one token a step, so there is no step to compile; "
                f"torch.compile(pipeline.transformer) does what is possible"
            )
        return self

    @staticmethod
    def check_call(output_type: str, num_images_per_prompt: int) -> None:
        """Raises ValueError on a bad argument."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1; got {num_images_per_prompt}")

    def check_settings(self, settings: dict[str, Any], sampler: Any = None) -> dict[str, Any]:
        """Those of `settings` that are not None.

        Args: sampler: None is the pipeline's own.   Raises: ValueError on a setting that it does not know.
        """
        sampler = self.sampler if sampler is None else sampler
        given = {k: v for k, v in settings.items() if v is not None}
        if unknown := sorted(given.keys() - sampler.settings().keys()):
            raise ValueError(
                f"{type(sampler).__name__} has no setting {', '.join(unknown)}; it has {', '.join(sampler.settings())}"
            )
        return given

    def size_for(self, control: Controls, height: int | None, width: int | None) -> dict[str, int]:
        """Height and width of what is drawn from control images.

        Models of any size (ControlAR's) draw that of the first image unless told otherwise, sides rounded up to what a
        token covers; others draw their own.
        Raises: ValueError when there are too many tokens.
        """
        native, grid = self.image_tokenizer.image_size, self.image_tokenizer.layout.grids[-1]
        if getattr(self.transformer.config, "rope_grid", None) is None:
            return {"height": height or native[0], "width": width or native[1]}
        first: Any = next(iter(control.values()), None) if isinstance(control, Mapping) else control
        first = first[0] if isinstance(first, Sequence) and len(first) else first
        if height is None and width is None and isinstance(first, Image.Image | Tensor):
            height, width = tuple(first.shape[-2:]) if isinstance(first, Tensor) else (first.height, first.width)
        sides = (height or native[0], width or native[1])
        patches = [own // side for own, side in zip(native, grid, strict=True)]
        height, width = (math.ceil(side / p) * p for side, p in zip(sides, patches, strict=True))
        most = math.prod(self.transformer.config.rope_grid)
        if (count := height * width // math.prod(patches)) > most:
            raise ValueError(
                f"images of {height}x{width} (that of the control image, unless height= and width= are given) are "
                f"{count} tokens; this model draws at most {most}: give a smaller height= and width="
            )
        return {"height": height, "width": width}

    def encode_control(
        self,
        control: Controls | None,
        strength: Strength | None,
        count: int | None,
        height: int | None = None,
        width: int | None = None,
    ) -> Cond | None:
        """Control images for `count` images; see `ControlCondition.encode`. None where none are to be used.

        Raises: ValueError when they are given to a model that takes none, or are missing where one needs them.
        """
        takes, name = "control" in self.transformer.takes, type(self.transformer).__name__
        if control is not None and not takes:
            raise ValueError(
                f"this {name} takes no control images: leave control= out, or take a model that was trained with them "
                f"(docs/control.md)"
            )
        if control is None:
            none = isinstance(strength, int | float) and strength == 0
            if strength is not None and not (takes and none):
                raise ValueError(f"control_strength={strength} without control images: give control=")
            if takes and not none and not self.transformer.config.control_drop_rate:
                kinds = ", ".join(self.transformer.controller.kinds) or "one kind"
                raise ValueError(
                    f"this {name} is steered by control images ({kinds}): give control=, or control_strength=0 to draw "
                    f"without any, which it was not trained for"
                )
            return None
        native = self.image_tokenizer.image_size
        condition = ControlCondition((height or native[0], width or native[1]), self.transformer.controller.kinds)
        encoded = condition.encode(control=control, strength=1.0 if strength is None else strength, count=count)
        return encoded.to(self._execution_device)

    def helpers(self) -> dict[str, Any]:
        """What the sampler is given besides the parts that every sampler takes."""
        return {}

    def choose_sampler(self, sampler: Any, batch: int) -> Any:
        """The sampler of a call.

        Args: sampler: None is the pipeline's own; a name, see `named_sampler`; or a sampler.   batch: images at once.
        Raises: ValueError on a bad name, where the model has nothing to draft, or with a draft that does not fit.
        """
        chosen = self.sampler if sampler is None else sampler
        if isinstance(sampler, str):
            chosen = named_sampler(sampler, self.sampler, self.transformer, batch)
        asking = isinstance(chosen, SpeculativeSampler | ContinuousSpeculativeSampler)
        if asking and (opened := chosen.model_to_open) is not None:
            chosen.draft_model = self.open_draft(*opened)
        if isinstance(sampler, str) and isinstance(chosen, ContinuousSpeculativeSampler):
            chosen.check_models(self.transformer, chosen.draft_model)
        return chosen

    def open_draft(self, option: str, name: str) -> Any:
        """What drafts for this model, by name or folder; the last one is kept open.

        Args: option: `model`, a smaller generator of the same tokens, or `network`, an EAGLE network.
        Raises: ValueError when nothing answers to the name, or what it was trained with is another tokenizer, or are
            other classes, as far as the folder says.
        """
        transformer = self.transformer
        key = (option, name, transformer.device, transformer.dtype)
        if self._draft is None or self._draft[0] != key:
            model = open_drafter(name, transformer) if option == "network" else self._smaller(name)
            model = model.to(transformer.device).eval()
            self._draft = key, model if model.dtype == transformer.dtype else model.to(transformer.dtype)
        return self._draft[1]

    def _smaller(self, name: str) -> Any:
        """A generator of the same classes and tokens. Raises ValueError, see `open_draft`."""
        model, labels = open_transformer(name, Generator)
        own = getattr(self, "labels", {})
        if labels and own and (odd := sorted(k for k in {*labels, *own} if labels.get(k) != own.get(k))):
            raise ValueError(
                f"the draft {name} has other classes than this model: {odd[0]} is {labels.get(odd[0])!r} there and "
                f"{own.get(odd[0])!r} here"
            )
        if find_folder(name) is not None:
            tokenizer, ours = open_tokenizer(name), dict(self.image_tokenizer.named_parameters())
            theirs = dict(tokenizer.named_parameters())
            if theirs.keys() != ours.keys() or not all(same(theirs[k], ours[k]) for k in ours):
                raise ValueError(
                    f"the draft {name} was trained on the tokens of another tokenizer; both models must share one"
                )
        return model

    @torch.no_grad()
    def draw(
        self,
        cond: Cond,
        null: Cond,
        rng: Rng,
        *,
        known: Known | None,
        output_type: str,
        callback: StepCallback | None,
        **settings: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """One image a row of `cond`, as `output_type` says, and what it took.

        Args: settings: of the sampler; None is its own default. `sampler`: one to use instead, or its name; `height`
            and `width`: see `at_size`.
        Raises: ValueError on a setting that this sampler does not know.
        """
        part = self.at_size(settings.pop("height", None), settings.pop("width", None))
        sampler = self.choose_sampler(settings.pop("sampler", None), len(cond))
        given = self.check_settings(settings, sampler)
        bar = self.progress_bar(total=sampler.count_steps(part.transformer, known=known, **given))

        def on_step(info: Any) -> None:
            bar.update()
            if callback is not None:
                callback(
                    self,
                    info.step,
                    int(info.positions.flatten()[-1]),
                    {"tokens": info.tokens, "positions": info.positions, "num_steps": info.num_steps},
                )

        with bar:
            out = sampler.generate(
                part.image_tokenizer,
                part.transformer,
                cond,
                rng,
                null=null,
                known=known,
                on_step=on_step,
                **self.helpers(),
                **given,
            )
        images = out.tokens if output_type == "latent" else part.to_images(out.tokens, output_type, rng)
        counts = {k: v for k, v in vars(out).items() if k != "tokens"}  # steps, network_calls, seconds, ...
        return images, counts

    def to_images(self, tokens: Tensor, output_type: str = "pil", rng: Rng | None = None) -> Any:
        """Tokens of all scales, or of the first few, as images; see `__call__` for `output_type`.

        Args: rng: of tokenizers that decode from noise; None is the same noise for each image.
        """
        return as_output(self.image_tokenizer.decode(tokens, rng).float().mul(0.5).add(0.5), output_type)

    def at_size(self, height: int | None = None, width: int | None = None) -> Self:
        """This pipeline for images of another size, with the same weights; itself at its own size.

        Raises: ValueError on a size that tokens do not divide, one too far from the model's, or a model that cannot.
        """
        native, grid = self.image_tokenizer.image_size, self.image_tokenizer.layout.grids[-1]
        size = (native[0] if height is None else height, native[1] if width is None else width)
        if size == native:
            return self
        wanted = check_size(size, native, grid, type(self.transformer).__name__)
        parts = {n: getattr(self, n).resized(wanted) for n in ("transformer", "image_tokenizer")}
        made = copy.copy(self)
        for name, part in parts.items():
            setattr(made, name, part)
        return made


MOST_AREA = 4
"""How many times more, or fewer, tokens than trained on may be drawn."""


def check_size(size: tuple[int, int], native: tuple[int, int], grid: tuple[int, ...], name: str) -> tuple[int, int]:
    """The token grid (h, w) of images (height, width). Raises ValueError, see `ImagePipeline.at_size`."""
    if len(grid) != 2:
        raise ValueError(
            f"the tokens of {name} have no places in the image (grid {grid}): it draws {native[0]}x{native[1]} alone"
        )
    patch = (native[0] // grid[0], native[1] // grid[1])
    if min(size) < 1 or size[0] % patch[0] or size[1] % patch[1]:
        near = [max(p, round(s / p) * p) for s, p in zip(size, patch, strict=True)]
        raise ValueError(
            f"height and width must be multiples of {patch[0]} and {patch[1]}, what a token covers; got "
            f"{size[0]}x{size[1]}, nearest is {near[0]}x{near[1]}"
        )
    wanted = (size[0] // patch[0], size[1] // patch[1])
    tokens, own = wanted[0] * wanted[1], grid[0] * grid[1]
    if not own <= tokens * MOST_AREA <= own * MOST_AREA**2:
        raise ValueError(
            f"{size[0]}x{size[1]} are {tokens} tokens; {name} was trained on {own}, and draws {own // MOST_AREA} to "
            f"{own * MOST_AREA}"
        )
    return wanted


def same(a: Tensor, b: Tensor) -> bool:
    """Whether weights are equal, in the dtype and on the device of `b`."""
    return a.shape == b.shape and torch.equal(a.to(b), b)


def as_output(images: Tensor, output_type: str) -> Any:
    """(B, 3, H, W) in [0, 1] as "pt", "np" or "pil"."""
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(a) for a in (array * 255).round().astype(np.uint8)]


def make_rng(
    count: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seed: int | None,
    rng: Rng | None,
) -> Rng:
    """The random numbers of `count` images. Raises ValueError when more than one source is given."""
    if sum(x is not None for x in (generator, seed, rng)) > 1:
        raise ValueError("give at most one of generator=, seed= and rng=")
    if rng is not None:
        if len(rng) != count:
            raise ValueError(f"rng= holds {len(rng)} images, but {count} are to be made")
        return rng
    if seed is not None:
        return Rng.from_seed(seed, count)
    if isinstance(generator, torch.Generator):
        return Rng.from_generator(generator, count)
    if generator is None:
        return Rng.from_seed(int(torch.randint(0, 2**62, (1,)).item()), count)
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} images; give one, or one an image")
    return Rng(torch.cat([Rng.from_generator(g, 1).seeds for g in generator]))


def generate(
    pipeline: Any,
    conditions: Sequence[Any],
    num: int,
    seed: int,
    batch_size: int,
    took: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Any, Image.Image]]:
    """Image 0 .. num - 1 of the set that `seed` names: (index, its class or prompt, image).

    Conditions (classes or prompts) are cycled. An image depends on its index, its condition and the settings, not on
    `batch_size`.

    Args: took: gets the `stats` of each batch.
    """
    for first in range(0, num, batch_size):
        indices = range(first, min(first + batch_size, num))
        wanted = [conditions[i % len(conditions)] for i in indices]
        out = pipeline(wanted, rng=Rng.from_seed(seed, len(indices), first), **settings)
        if took is not None:
            took.append(out.stats)
        yield from zip(indices, wanted, out.images, strict=True)


def speculation(took: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What samplers of several tokens a pass brought over batches, given their `stats`; empty where there are none.

    tokens_per_call: mean over images.   law: whether it is that of plain decoding.
    accepted, drafted: tokens in all, where any were drafted.
    """
    stats = [each for each in took if "tokens_per_call" in each]
    if not stats:
        return {}
    rates = [rate for each in stats for rate in each["tokens_per_call"]]
    found: dict[str, Any] = {
        "tokens_per_call": sum(rates) / len(rates),
        "law": "lossless" if all(each["lossless"] for each in stats) else "not lossless",
    }
    if "drafted" in stats[0]:
        found |= {name: sum(sum(each[name]) for each in stats) for name in ("accepted", "drafted")}
    return found


def told(drafts: dict[str, Any]) -> str:
    """What `speculation` gave, in words."""
    counts = "{accepted} of {drafted} drafts accepted, ".format(**drafts) if "drafted" in drafts else ""
    return f"{drafts['tokens_per_call']:.2f} tokens a pass, {counts}{drafts['law']}"
