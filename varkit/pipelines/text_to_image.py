"""Generation from text, and editing, with the arguments and outputs of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from varkit.conditioning.control import Controls, Strength
from varkit.conditioning.text import T5, Phrases, TextCondition
from varkit.interfaces import Cond
from varkit.pipelines.base import ImageOutput, ImagePipeline, StepCallback, make_rng
from varkit.pipelines.edit import Box
from varkit.pipelines.editing import Images, Masks
from varkit.rng import Rng
from varkit.samplers.next_group import Known

Prompt = str | Sequence[str]
Features = Tensor | str | Path | Sequence[str | Path | Tensor]


class TextToImagePipeline(ImagePipeline):
    """Prompts -> images.

    Args:
        transformer: a generator conditioned on text, such as `LlamaGen(num_classes=None)`.
        image_tokenizer: the tokenizer whose tokens it predicts.
        sampler: a `NextGroupSampler`; its configuration holds this model's default settings.
        text_encoder, tokenizer: a transformers encoder and its tokenizer; saved with the pipeline. Without them
            `text_encoder_name` is opened when the first prompt comes; features need neither.
        text_encoder_name: a transformers encoder, by name or folder.
        clean_prompts: take links, mark-up and codes out of prompts, as out of the captions in training.
    Raises: ValueError when the parts were not made for each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: Any,
        image_tokenizer: Any,
        sampler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_name: str = T5,
        clean_prompts: bool = True,
    ) -> None:
        super().__init__()
        transformer.layout.require(image_tokenizer.layout, "the transformer", "the image tokenizer")
        if transformer.condition != "text":
            raise ValueError(f"the transformer is conditioned on a {transformer.condition}, not on text")
        self.register_modules(
            transformer=transformer,
            image_tokenizer=image_tokenizer,
            sampler=sampler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(text_encoder_name=text_encoder_name, clean_prompts=clean_prompts)
        self._opened: TextCondition | None = None

    @property
    def text_condition(self) -> TextCondition:
        """What turns prompts into features; the encoder is opened when first needed."""
        if self._opened is None or self.text_encoder not in (None, self._opened.encoder):
            encoder = self.config.text_encoder_name if self.text_encoder is None else self.text_encoder
            length, clean = self.transformer.config.text_length, self.config.clean_prompts
            self._opened = TextCondition(encoder, self.tokenizer, max_length=length, clean=clean)
        return self._opened

    def encode_prompt(
        self,
        prompt: Prompt | None = None,
        features: Features | None = None,
        features_mask: Tensor | None = None,
        phrases: Phrases | None = None,
    ) -> Cond:
        """Features of prompts, of sets of phrases, or features made before, on the pipeline's device; see
        `TextCondition.encode`."""
        device, condition = self._execution_device, self.text_condition
        if prompt is not None or phrases is not None:
            if phrases is not None:  # before the encoder is opened
                condition.sets(phrases)
            else:
                condition.cleaned([prompt] if isinstance(prompt, str) else prompt)  # type: ignore[arg-type, list-item]
            condition.open()
            condition.encoder.to(device)
        return condition.encode(prompt=prompt, phrases=phrases, features=features, mask=features_mask).to(device)

    def no_prompt(self) -> Cond:
        """The condition of one image without any text."""
        length, width = self.transformer.config.text_length, self.transformer.config.text_dim
        shape = torch.zeros(1, length, width, device=self._execution_device)
        return self.transformer.null(Cond(sequence=shape, mask=torch.ones_like(shape[..., 0], dtype=torch.bool)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        features: Features | None = None,
        features_mask: Tensor | None = None,
        phrases: Phrases | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        rng: Rng | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_schedule: str | None = None,
        num_inference_steps: int | None = None,
        known: Known | None = None,
        control: Controls | None = None,
        control_strength: Strength | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **sampling: Any,
    ) -> ImageOutput | tuple[Any]:
        """Generate one image for each prompt (times `num_images_per_prompt`).

        Args:
            prompt: one text or several; an empty one is an error. None, without features, draws an image of no text.
            negative_prompt: what guidance leads away from, one for all or one a prompt; None is the absence of text.
            features, features_mask: instead of prompts; see `TextCondition.encode`.
            phrases: instead of prompts: a set of phrases whose order does not count, `["waving hand", "medium skin
                tone"]`, or a list of such sets, one an image. The sets are `prompts` of the output, sorted.
            guidance_scale: 1 is off; None is this model's default, as for all sampling settings below.
            generator, seed, rng: where randomness comes from, at most one of them; a list of generators
                gives one an image. The same seed gives an image the same random numbers in any batch.
            temperature, top_k, top_p, min_p, guidance_schedule: see `NextGroupSampler`.
            num_inference_steps: the sampler's `num_steps`.
            sampling: further settings of this model's sampler, such as guidance_interval, num_tokens or more_smooth;
                `sampler`, another sampler or its name, such as "sjd" or "auto" (docs/sampling.md); `height` and
                `width`, where the model can draw other sizes (docs/editing.md, "Other sizes").
            known: tokens to keep; see `edit`.
            control, control_strength: as in `ClassToImagePipeline`; one for all prompts or one a prompt. Models of any
                size draw that of the control image, sides rounded up to multiples of what a token covers, unless
                `height` and `width` are given.
            output_type, callback_on_step_end: as in `ClassToImagePipeline`.
        Raises: ValueError on a bad argument, before any work.
        """
        self.check_call(output_type, num_images_per_prompt)
        if [prompt, phrases, features].count(None) < 2:
            raise ValueError("give prompt=, phrases= or features=, not both")
        if phrases is not None and not self.transformer.reads_phrases:
            raise ValueError(f"{type(self.transformer).__name__} cannot read a set of phrases: give prompt=")
        self.sampler.settings(guidance_scale=guidance_scale, guidance_schedule=guidance_schedule)
        sets = None if phrases is None else self.text_condition.sets(phrases)
        unconditional = prompt is None and features is None and sets is None
        if control is not None and "control" in self.transformer.takes:
            sampling |= self.size_for(control, sampling.get("height"), sampling.get("width"))
        one = unconditional or isinstance(prompt, str) or (sets is not None and len(sets) == 1)
        size = {name: sampling.get(name) for name in ("height", "width")}
        cond = self.no_prompt() if unconditional else None
        if features is not None:
            cond = self.encode_prompt(None, features, features_mask)
        captions = None if one else len(sets or prompt) if cond is None else len(cond)  # type: ignore[arg-type]
        steered = self.encode_control(control, control_strength, captions, **size)
        if cond is None:
            cond = self.encode_prompt(prompt, phrases=phrases)
        if steered is not None and one:  # for each of the control images
            cond = cond[torch.zeros(len(steered), dtype=torch.int64, device=self._execution_device)]
        null = self.transformer.null(cond)
        if negative_prompt is not None:
            null = self.encode_prompt(negative_prompt)
            if len(null) not in (1, len(cond)):
                raise ValueError(f"{len(null)} negative prompts for {len(cond)} prompts; give one, or one a prompt")
        if steered is not None:
            cond = cond + steered
        rows = torch.arange(len(cond), device=self._execution_device).repeat_interleave(num_images_per_prompt)
        rng = make_rng(len(rows), generator, seed, rng).to(self._execution_device)
        images, stats = self.draw(
            cond[rows],
            null[rows if len(null) == len(cond) else torch.zeros_like(rows)],
            rng,
            known=known,
            output_type=output_type,
            callback=callback_on_step_end,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            num_steps=num_inference_steps,
            **sampling,
        )
        if not return_dict:
            return (images,)
        texts = None
        if prompt is not None or sets is not None:
            given = [prompt] if isinstance(prompt, str) else list(prompt or [", ".join(own) for own in sets or ()])
            given = given * len(cond) if len(given) == 1 else given
            texts = [text for text in given for _ in range(num_images_per_prompt)]
        return ImageOutput(images=images, class_labels=None, stats=stats, prompts=texts)

    def edit(
        self,
        image: Images,
        mask: Masks | None = None,
        box: Box | None = None,
        keep: str = "outside",
        prompt: Prompt | None = None,
        **settings: Any,
    ) -> ImageOutput | tuple[Any]:
        """Redraw a part of an image; arguments as in `ClassToImagePipeline.edit`.

        Args: prompt: what to draw, one for all images or one each; None leaves it to the surroundings.
        Raises: ValueError on a bad argument, before any work.
        """
        plan = self.plan_edit(image, mask, box, keep, settings)
        images = len(plan.images)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None and len(prompts) == 1:
            prompts = [*prompts] * images
        count = 1 if prompts is None else len(prompts)
        if count != images:
            raise ValueError(f"{images} images but {count} prompts; give one each, and one image where there is none")
        return self.carry_out(plan, lambda **more: self(prompts, **more), settings, {"prompts": prompts})
