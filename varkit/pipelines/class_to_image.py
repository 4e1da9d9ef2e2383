"""Class-conditional generation and editing, with the arguments and outputs of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkit.conditioning.control import Controls, Strength
from varkit.conditioning.label import LabelCondition
from varkit.interfaces import Cond
from varkit.pipelines.base import ImageOutput, ImagePipeline, StepCallback, as_output, make_rng
from varkit.pipelines.best_of import BestOf, Choice
from varkit.pipelines.edit import Box
from varkit.pipelines.editing import Images, Masks
from varkit.pipelines.labels import Labelled
from varkit.rng import Draw, Rng
from varkit.samplers.next_group import Known


class ClassToImagePipeline(Labelled, ImagePipeline):
    """Class labels -> images.

    Args:
        transformer: a generator, such as `VAR`.
        image_tokenizer: the tokenizer whose tokens it predicts.
        sampler: a `NextGroupSampler`; its configuration holds this model's default settings.
        id2label: class names by id, as text keys ("0", "1", ...), for people.
    Raises: ValueError when transformer and tokenizer were not made for each other.
    """

    model_cpu_offload_seq = "transformer->image_tokenizer"

    def __init__(
        self, transformer: Any, image_tokenizer: Any, sampler: Any, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        transformer.layout.require(image_tokenizer.layout, "the transformer", "the image tokenizer")
        if transformer.condition != "class":
            raise ValueError(
                f"the transformer is conditioned on {transformer.condition}, not on classes; AutoPipeline and assemble "
                f"choose the pipeline that fits"
            )
        self.register_modules(transformer=transformer, image_tokenizer=image_tokenizer, sampler=sampler)
        self.register_to_config(id2label=id2label)

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
        num_inference_steps: int | None = None,
        best_of: int = 1,
        classifier: str | Path | nn.Module | None = None,
        accept: float | None = None,
        known: Known | None = None,
        control: Controls | None = None,
        control_strength: Strength | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **sampling: Any,
    ) -> ImageOutput | tuple[Any]:
        """Generate one image for each label (times `num_images_per_prompt`).

        Args:
            class_labels: ids or names; None draws one class at random.
            guidance_scale: 1 is off; None is this model's default, as for all sampling settings below.
            generator, seed, rng: where randomness comes from, at most one of them; a list of generators
                gives one an image. The same seed gives an image the same random numbers in any batch.
            temperature, top_k, top_p, min_p, guidance_schedule: see `NextGroupSampler`.
            num_inference_steps: the sampler's `num_steps`.
            sampling: further settings of this model's sampler, such as guidance_interval, num_tokens or more_smooth;
                `sampler`, another sampler or its name, such as "sjd" or "auto" (docs/sampling.md); `height` and
                `width`, where the model can draw other sizes (docs/editing.md, "Other sizes").
            best_of, classifier, accept: draw so many candidates of each image and keep the one that the classifier is
                surest of; see `BestOf`. `stats` then holds sums over the candidates.
            known: tokens to keep; see `edit`.
            control: of a model that control images steer: one for all labels or one a label, a PIL image, a list or a
                tensor; or a mapping of kinds to such. PIL images are brought to the model's size.
            control_strength: how strongly they steer: a number, one a label, or either by kind; 0 is not at all, None
                as trained, 1.
            output_type: "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W in [0, 1]) or "latent" (tokens).
            callback_on_step_end: called as (pipeline, step, last position of the step, {"tokens",
                "positions", "num_steps"}) after each step.
        Raises: ValueError on a bad argument, before any work.
        """
        self.check_call(output_type, num_images_per_prompt)
        if texts := sampling.keys() & {"prompt", "phrases"}:
            name = type(self.transformer).__name__
            raise ValueError(f"this {name} is drawn from classes and reads no {texts.pop()}: give class_labels=")
        device = self._execution_device
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        if labels is not None and len(labels) == 0:
            raise ValueError("class_labels is empty; give at least one class, or None for a random one")
        one_class = not isinstance(class_labels, Sequence) or isinstance(class_labels, str)
        size: dict[str, Any] = {name: sampling.get(name) for name in ("height", "width")}
        if control is not None and "control" in self.transformer.takes:
            size = self.size_for(control, **size)
            sampling |= size
        steered = self.encode_control(control, control_strength, None if one_class else len(labels or ()), **size)
        if steered is not None and one_class:
            labels = labels and [*labels] * len(steered)
        rows = 1 if labels is None else len(labels)
        rows = len(steered) if steered is not None else rows
        count = rows * num_images_per_prompt
        rng = make_rng(count, generator, seed, rng).to(device)
        condition = LabelCondition(self.transformer.num_classes)
        if labels is None:
            u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.LABEL)[:, 0]
            cond = Cond((u * self.transformer.num_classes).long())
        else:
            ids = torch.tensor(self.label_ids(labels)).repeat_interleave(num_images_per_prompt)
            cond = condition.encode(class_labels=ids).to(device)
        null = condition.null(cond)
        if steered is not None:
            cond = cond + steered[torch.arange(rows, device=device).repeat_interleave(num_images_per_prompt)]
        settings = {
            "callback": callback_on_step_end,
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "num_steps": num_inference_steps,
            **sampling,
        }
        labels = cond.labels.tolist()
        if best_of == 1 and classifier is None and accept is None:
            images, stats = self.draw(cond, null, rng, known=known, output_type=output_type, **settings)
            return ImageOutput(images=images, class_labels=labels, stats=stats) if return_dict else (images,)
        chooser = BestOf(self, best_of, classifier, accept)
        chooser.check_labels(labels)
        images, choice = self.draw_best(chooser, cond, null, rng, known, output_type, **settings)
        if not return_dict:
            return (images,)
        return ImageOutput(
            images=images, class_labels=labels, stats=choice.stats, scores=choice.scores, chosen=choice.chosen
        )

    def draw_best(
        self,
        chooser: BestOf,
        cond: Cond,
        null: Cond,
        rng: Rng,
        known: Known | None,
        output_type: str,
        **settings: Any,
    ) -> tuple[Any, Choice]:
        """As `draw`, the chosen one of several candidates for each row, and what they scored and took."""
        if self.at_size(settings.pop("height", None), settings.pop("width", None)) is not self:
            raise ValueError("a classifier looks at images of the model's own size: leave height= and width= out")

        def one(rows: Tensor, numbers: Rng) -> tuple[Tensor, dict[str, Any]]:
            some = known
            if known is not None:
                tokens, keep = known
                some = (tokens[rows], keep if keep.dim() == 1 else keep.expand(len(tokens), -1)[rows])
            return self.draw(cond[rows], null[rows], numbers, known=some, output_type="latent", **settings)

        latent = output_type == "latent"
        kept, choice = chooser.draw(one, lambda x, own: self.to_images(x, "pt", own), cond.labels, rng, latent)
        return kept if latent else as_output(kept, output_type), choice

    def edit(
        self,
        image: Images,
        mask: Masks | None = None,
        box: Box | None = None,
        keep: str = "outside",
        class_labels: Sequence[int | str] | int | str | None = None,
        **settings: Any,
    ) -> ImageOutput | tuple[Any]:
        """Redraw a part of an image: in-painting, out-painting, variations, edits towards a class (docs/editing.md).

        The tokens of the kept part are fed to the generator at every scale; pixels near the border may
        change slightly, as in the paper's zero-shot editing (section 5.2). `paste_back=True` keeps them as they were.

        Args:
            image: PIL image(s) of any size and mode, or (B, 3, H, W) in [-1, 1] of the model's size.
            mask: white (or 1) is redrawn; any size, stretched over the image; one for all, or one an image.
            box: (top, left, bottom, right) in [0, 1] of the image. At most one of the two.
            keep: with a box: "outside" redraws the box, "inside" redraws everything else.
            class_labels: what to draw; None leaves it to the surroundings (the null class).
            settings: any argument of `__call__` but `known`; and those of `EditOptions`: extend, strength, threshold,
                fit, paste_back, feather, height, width.
        Returns: as `__call__`. Where all is marked, images as without `known`; where nothing is, the image through the
            tokenizer, or with paste_back as it was. `stats["note"]` says so.
        Raises: ValueError on a bad argument, before any work.
        """
        plan = self.plan_edit(image, mask, box, keep, settings)
        count = len(plan.images)
        if class_labels is None:
            class_labels = [self.transformer.num_classes] * count
        elif isinstance(class_labels, int | str):
            class_labels = [class_labels] * count
        if len(class_labels) != count:
            raise ValueError(f"{count} images but {len(class_labels)} class labels; give one each")
        about = {"class_labels": self.label_ids(class_labels)}
        return self.carry_out(plan, lambda **more: self(class_labels, **more), settings, about)
