"""Class-conditional generation and editing, with the arguments and outputs of diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from varkit import registry
from varkit.conditioning.label import LabelCondition
from varkit.config import nearest
from varkit.hub import HubMixin
from varkit.interfaces import Cond
from varkit.pipelines.edit import Box, box_mask, image_to_tensor, keep_pyramid, mask_to_tensor
from varkit.rng import Draw, Rng
from varkit.samplers.next_group import Known, StepInfo

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ImageOutput(BaseOutput):
    """`images`: a list of PIL images; (B, H, W, 3) float in [0, 1]; (B, 3, H, W) in [0, 1]; or tokens."""

    images: list[Image.Image] | np.ndarray | Tensor
    class_labels: list[int]
    stats: dict[str, Any]


class ClassToImagePipeline(HubMixin, DiffusionPipeline):
    """Class labels -> images.

    Args:
        transformer: a generator, such as `VAR`.
        image_tokenizer: the tokenizer whose tokens it predicts.
        sampler: a `NextGroupSampler` or `MaskedSampler`; its configuration holds this model's default settings.
        id2label: class names by id, as text keys ("0", "1", ...), for people.
    Raises: ValueError when transformer and tokenizer were not made for each other.
    """

    model_cpu_offload_seq = "transformer->image_tokenizer"

    def __init__(
        self, transformer: Any, image_tokenizer: Any, sampler: Any, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        transformer.layout.require(image_tokenizer.layout, "the transformer", "the image tokenizer")
        self.register_modules(transformer=transformer, image_tokenizer=image_tokenizer, sampler=sampler)
        self.register_to_config(id2label=id2label)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which builds only classes of modules that are imported: here are ours, and plug-ins'."""
        registry.list_models()
        return super().from_pretrained(*args, **kwargs)

    @property
    def labels(self) -> dict[int, str]:
        """Class names by id; empty when the model has none."""
        return {int(k): v for k, v in (self.config.id2label or {}).items()}

    def label_ids(self, names: Sequence[str | int]) -> list[int]:
        """Class ids of names or numbers. Raises ValueError naming the nearest class."""
        by_name = {v.lower(): k for k, v in self.labels.items()}
        ids = []
        for name in names:
            text = str(name).strip()
            if re.fullmatch(r"-?[0-9]+", text):
                ids.append(int(text))
            elif text.lower() in by_name:
                ids.append(by_name[text.lower()])
            else:
                known = ", ".join(self.labels.values()) or f"0 to {self.transformer.num_classes - 1}"
                raise ValueError(f"no class is called {text!r}{nearest(text.lower(), by_name)}; classes: {known}")
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        rng: Rng | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_schedule: str | None = None,
        more_smooth: bool | None = None,
        num_inference_steps: int | None = None,
        order: str | None = None,
        known: Known | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        **sampling: Any,
    ) -> ImageOutput | tuple[Any]:
        """Generate one image for each label (times `num_images_per_prompt`).

        Args:
            class_labels: ids or names; None draws one class at random.
            guidance_scale: 1 is off; None is this model's default, as for all sampling settings below.
            generator, seed, rng: where randomness comes from, at most one of them; a list of generators
                gives one an image. The same seed gives an image the same random numbers in any batch.
            temperature, top_k, top_p, min_p, guidance_schedule, more_smooth, order: see `NextGroupSampler`.
            num_inference_steps: the sampler's `num_steps`.   sampling: further settings that this sampler knows.
            known: tokens to keep; see `edit`.
            output_type: "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W in [0, 1]) or "latent" (tokens).
            callback_on_step_end: called as (pipeline, step, last position of the step, {"tokens",
                "positions", "num_steps"}) after each step.
        Raises: ValueError on a bad argument, before any work.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1; got {num_images_per_prompt}")
        settings = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "more_smooth": more_smooth,
            "num_steps": num_inference_steps,
            "order": order,
            **sampling,
        }
        given = {k: v for k, v in settings.items() if v is not None}
        if unknown := sorted(given.keys() - self.sampler.settings().keys()):
            raise ValueError(
                f"{type(self.sampler).__name__} has no setting {', '.join(unknown)}; it has "
                f"{', '.join(self.sampler.settings())}"
            )
        device = self._execution_device
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        count = (1 if labels is None else len(labels)) * num_images_per_prompt
        if count == 0:
            raise ValueError("class_labels is empty; give at least one class, or None for a random one")
        rng = make_rng(count, generator, seed, rng).to(device)
        condition = LabelCondition(self.transformer.num_classes)
        if labels is None:
            u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.LABEL)[:, 0]
            cond = Cond((u * self.transformer.num_classes).long())
        else:
            ids = torch.tensor(self.label_ids(labels)).repeat_interleave(num_images_per_prompt)
            cond = condition.encode(class_labels=ids).to(device)
        bar = self.progress_bar(total=self.sampler.count_steps(self.transformer, **given))

        def on_step(info: StepInfo) -> None:
            bar.update()
            if callback_on_step_end is not None:
                callback_on_step_end(
                    self,
                    info.step,
                    int(info.positions[-1]),
                    {"tokens": info.tokens, "positions": info.positions, "num_steps": info.num_steps},
                )

        with bar:
            out = self.sampler.generate(
                self.image_tokenizer,
                self.transformer,
                cond,
                rng,
                null=condition.null(cond),
                known=known,
                on_step=on_step,
                **given,
            )
        images = out.tokens if output_type == "latent" else self.to_images(out.tokens, output_type)
        if not return_dict:
            return (images,)
        stats = {"steps": out.steps, "network_calls": out.network_calls, "seconds": out.seconds}
        return ImageOutput(images=images, class_labels=cond.labels.tolist(), stats=stats)

    def to_images(self, tokens: Tensor, output_type: str = "pil") -> Any:
        """Tokens of all scales, or of the first few, as images; see `__call__` for `output_type`."""
        images = self.image_tokenizer.decode(tokens).float().mul(0.5).add(0.5)  # B 3 H W in [0, 1]
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(a) for a in (array * 255).round().astype(np.uint8)]

    def edit(
        self,
        image: Image.Image | Tensor | Sequence[Image.Image],
        mask: Image.Image | Tensor | None = None,
        box: Box | None = None,
        keep: str = "outside",
        class_labels: Sequence[int | str] | int | str | None = None,
        **settings: Any,
    ) -> ImageOutput | tuple[Any]:
        """Redraw a part of an image: in-painting, out-painting, or editing towards a class.

        The tokens of the kept part are fed to the generator at every scale; pixels near the border may
        change slightly, as in the paper's zero-shot editing (section 5.2).

        Args:
            image: PIL image(s), resized to the model's size, or (B, 3, H, W) in [-1, 1].
            mask: white (or 1) is redrawn; any size.   box: (top, left, bottom, right) in [0, 1].
                Exactly one of the two.
            keep: with a box: "outside" redraws the box, "inside" redraws everything else.
            class_labels: what to draw; None leaves it to the surroundings (the null class).
            settings: any argument of `__call__` but `known`.
        Raises: ValueError on a bad argument, before any work.
        """
        if (mask is None) == (box is None):
            raise ValueError("give exactly one of mask= and box=")
        tokenizer = self.image_tokenizer
        pixels = image_to_tensor(image, tokenizer.image_size).to(self._execution_device)
        grid = tokenizer.layout.grids[-1]
        if len(grid) != 2:
            raise ValueError(
                f"the {tokenizer.layout.length} tokens of this model have no places in the image (grid {grid}), so no "
                f"part of it can be kept; edit with a model whose tokens form a grid (h, w)"
            )
        if box is not None:
            kept = box_mask(grid, box, keep)
        else:
            kept = 1 - mask_to_tensor(mask, grid)
        pyramid = keep_pyramid(tokenizer.layout, kept).to(pixels.device)
        with torch.no_grad():
            given = tokenizer.encode(pixels)
        if class_labels is None:
            class_labels = [self.transformer.num_classes] * len(pixels)
        elif isinstance(class_labels, int | str):
            class_labels = [class_labels] * len(pixels)
        per = settings.get("num_images_per_prompt", 1)
        if len(class_labels) != len(pixels):
            raise ValueError(f"{len(pixels)} images but {len(class_labels)} class labels; give one each")
        return self(class_labels, known=(given.repeat_interleave(per, 0), pyramid), **settings)


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
    pipeline: Any, classes: Sequence[int], num: int, seed: int, batch_size: int, **settings: Any
) -> Iterator[tuple[int, int, Image.Image]]:
    """Image 0 .. num - 1 of the set that `seed` names: (index, class, image).

    Classes are cycled. An image depends on its index, its class and the settings, not on `batch_size`.
    """
    for first in range(0, num, batch_size):
        indices = range(first, min(first + batch_size, num))
        labels = [classes[i % len(classes)] for i in indices]
        out = pipeline(class_labels=labels, rng=Rng.from_seed(seed, len(indices), first), **settings)
        yield from zip(indices, labels, out.images, strict=True)
