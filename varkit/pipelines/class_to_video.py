"""Clips of classes, and clips that go on from given frames; longer ones by a context that slides.

A model draws windows of `num_frames` frames. First frames are known tokens to it (`Tokenizer.encode_start`), or, of
models of frame prediction (LARP's), the tokens of a clip that repeats the last of them. A longer clip is windows in a
row: the last `context_frames` frames that are there are the first frames of the next window.

Shapes: B clips, T frames, N frames of a window, H W pixels, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varkit.conditioning.frames import FrameCondition
from varkit.conditioning.label import LabelCondition
from varkit.interfaces import Cond
from varkit.pipelines.base import ImagePipeline, StepCallback, make_rng
from varkit.pipelines.clips import Frames, VideoOutput, clips_as_output, read_frames, summed
from varkit.pipelines.labels import Labelled
from varkit.pipelines.windows import Window, Windowed, counted
from varkit.rng import Draw, Rng
from varkit.samplers.next_group import Known


class ClassToVideoPipeline(Labelled, Windowed, ImagePipeline):
    """Class labels, first frames, or both -> clips.

    Args:
        transformer: a generator; its `condition` is `class`, or `frames` for frame prediction.
        image_tokenizer: the tokenizer of clips whose tokens it predicts.
        sampler: of these tokens; its configuration holds this model's default settings.
        id2label: class names by id, as text keys ("0", "1", ...), for people.
    Raises: ValueError when the parts were not made for each other, or the tokenizer's are images.
    """

    model_cpu_offload_seq = "transformer->image_tokenizer"

    def __init__(
        self, transformer: Any, image_tokenizer: Any, sampler: Any, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        transformer.layout.require(image_tokenizer.layout, "the transformer", "the image tokenizer")
        if transformer.condition not in ("class", "frames"):
            raise ValueError(
                f"the transformer is conditioned on {transformer.condition}; clips are drawn from classes or frames"
            )
        if image_tokenizer.num_frames is None:
            raise ValueError(
                f"{type(image_tokenizer).__name__} codes images, not clips: take ClassToImagePipeline, or a tokenizer "
                f"of clips, such as FrameTokenizer around it"
            )
        if transformer.condition == "frames":
            FrameCondition(image_tokenizer)  # refuses latents
        self.register_modules(transformer=transformer, image_tokenizer=image_tokenizer, sampler=sampler)
        self.register_to_config(id2label=id2label)

    # ---- calls ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        frames: Frames | None = None,
        num_frames: int | None = None,
        context_frames: int | None = None,
        keep_given: bool = True,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        rng: Rng | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_schedule: str | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **sampling: Any,
    ) -> VideoOutput | tuple[Any]:
        """Generate one clip for each label, or each clip begun (times `num_videos_per_prompt`).

        Args:
            class_labels: ids or names. None draws one at random; with frames, it leaves the class to them.
            frames: that the clip begins with: one clip for all labels, or one a label; see `read_frames`.
            num_frames: of the whole clip, given ones counted; what is drawn beyond is cut off. None is one window.
            context_frames: how many of the last frames that are there a window begins with. None is all given ones,
                where tokens allow it, and else the most, of 5 and half a window, whose tokens can be known.
            keep_given: given frames come back as they were; False has those that were read as the model draws them:
                through the tokenizer and back, as papers score them.
            guidance_scale, generator, seed, rng, temperature, top_k, top_p, min_p, guidance_schedule, sampling: as in
                `ClassToImagePipeline`.   num_inference_steps: of each window.
            output_type: "pil", "np" (B, T, H, W, 3 in [0, 1]), "pt" (B, T, 3, H, W in [0, 1]) or "latent" (tokens of
                one window).
            callback_on_step_end: called as (pipeline, step, last position of the step, {"tokens", "positions",
                "num_steps", "window"}) after each step; steps and num_steps are those of all windows.
        Raises: ValueError on a bad argument, before any work.
        """
        self.check_call(output_type, num_videos_per_prompt)
        self._check_sampling(sampling, guidance_scale)
        begun = None if frames is None else read_frames(frames, self.image_tokenizer.image_size)
        given = 0 if begun is None else begun.shape[2]
        if context_frames is not None and context_frames < 1:
            raise ValueError(f"context_frames must be at least 1; got {context_frames}")
        windows = self.plan(given, num_frames, context_frames)
        if output_type == "latent" and len(windows) > 1:
            raise ValueError("output_type='latent' gives the tokens of one window: ask for fewer frames, or for pixels")
        labels = self._labels(class_labels, begun)
        begun, rows = self._paired(labels, begun)
        rng = make_rng(rows * num_videos_per_prompt, generator, seed, rng).to(self._execution_device)
        cond = self._class_cond(labels, given > 0, rng, num_videos_per_prompt)
        settings = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "num_steps": num_inference_steps,
            **sampling,
        }
        if begun is not None:
            begun = begun.to(self._execution_device).repeat_interleave(num_videos_per_prompt, 0)
        videos, stats = self._windows(
            windows, begun, cond, rng, keep_given, output_type, callback_on_step_end, settings
        )
        if output_type != "latent":
            videos = clips_as_output(videos[:, :, :num_frames], output_type)
        nameless = cond is None or self.transformer.num_classes == 0 or (labels is None and given > 0)
        told = None if nameless or cond is None else cond.labels.tolist()
        return VideoOutput(videos=videos, class_labels=told, stats=stats) if return_dict else (videos,)

    def _check_sampling(self, sampling: dict[str, Any], guidance_scale: float | None) -> None:
        """Raises ValueError on what clips do not take."""
        name = type(self.transformer).__name__
        if odd := sampling.keys() & {"prompt", "phrases", "control", "known", "best_of", "classifier"}:
            raise ValueError(f"this {name} draws clips and takes no {sorted(odd)[0]}=; see docs/video.md")
        if self.transformer.condition == "frames":
            scale = self.sampler.settings(guidance_scale=guidance_scale)["guidance_scale"]
            if scale != 1:
                raise ValueError(f"{name} knows no absence of frames to lead away from: guidance_scale must be 1")

    def _labels(self, class_labels: Any, begun: Tensor | None) -> list[int] | None:
        """Class ids. None: no class was given."""
        if class_labels is None:
            return None
        if self.transformer.condition == "frames":
            raise ValueError(f"this {type(self.transformer).__name__} draws from frames alone: leave class_labels= out")
        names = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not names:
            raise ValueError("class_labels is empty; give at least one class, or None for a random one")
        ids = self.label_ids(names)
        LabelCondition(self.transformer.num_classes).encode(class_labels=ids)
        if isinstance(class_labels, int | str) and begun is not None:
            ids *= len(begun)
        return ids

    @staticmethod
    def _paired(labels: list[int] | None, begun: Tensor | None) -> tuple[Tensor | None, int]:
        """First frames, one clip a label, and how many clips that is. Raises ValueError when they are not as many."""
        if begun is None or labels is None:
            return begun, 1 if begun is None and labels is None else len(labels if begun is None else begun)  # type: ignore[arg-type]
        if len(begun) not in (1, len(labels)):
            raise ValueError(f"{len(begun)} clips of first frames but {len(labels)} class labels; give one each")
        return begun.expand(len(labels), -1, -1, -1, -1), len(labels)

    def _class_cond(self, labels: list[int] | None, begun: bool, rng: Rng, per: int) -> Cond | None:
        """The classes of all clips; None for a model of frame prediction."""
        if self.transformer.condition == "frames":
            return None
        count = self.transformer.num_classes
        if labels is not None:
            ids = torch.tensor(labels).repeat_interleave(per)
        elif begun:
            ids = torch.full((len(rng),), count)  # the null class: frames say what it is
        else:
            u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.LABEL)[:, 0].cpu()
            ids = (u * count).long()
        return Cond(ids.to(self._execution_device))

    # ---- windows ----------------------------------------------------------------------------------------------

    def _windows(
        self,
        windows: Sequence[Window],
        there: Tensor | None,
        labels: Cond | None,
        rng: Rng,
        keep_given: bool,
        output_type: str,
        callback: StepCallback | None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Clips (B, 3, T, H, W) in [0, 1], or tokens, and what they took.

        Args: there: first frames (B, 3, t, H, W) in [-1, 1].
        """
        took: list[dict[str, Any]] = []
        steps = [self._steps(window.context, settings) for window in windows]
        for number, window in enumerate(windows):
            read = None if there is None or not window.context else there[:, :, -window.context :]
            cond, known = self._conditioned(read, labels)
            null = cond if labels is None else LabelCondition(self.transformer.num_classes).null(cond)
            made, stats = self.draw(
                cond,
                null,
                rng.candidate(number),
                known=known,
                output_type="latent",
                callback=counted(callback, number, steps),
                **settings,
            )
            took.append(stats)
            if output_type == "latent":
                return made, summed(took)
            clip = self.image_tokenizer.decode(made, rng.candidate(number)).float().clamp(-1, 1)
            if there is None:
                there = clip
            elif keep_given or number:
                there = torch.cat([there, clip[:, :, window.context :]], 2)
            else:
                there = torch.cat([there[:, :, : there.shape[2] - window.context], clip], 2)
        assert there is not None
        return there.mul(0.5).add(0.5), summed(took)

    def _conditioned(self, read: Tensor | None, labels: Cond | None) -> tuple[Cond, Known | None]:
        """The condition of a window that begins with frames (B, 3, t, H, W), and its known tokens."""
        tokenizer, layout = self.image_tokenizer, self.image_tokenizer.layout
        if labels is None:
            assert read is not None
            return FrameCondition(tokenizer).encode(frames=read), None
        if read is None:
            return labels, None
        start = tokenizer.encode_start(read)  # B k, or B k C
        tokens, keep = start.new_zeros(len(start), layout.length, *start.shape[2:]), self._keep(start.shape[1])
        tokens[:, keep] = start
        return labels, (tokens, keep)

    def _keep(self, count: int) -> Tensor:
        """(L,) bool: which tokens those are that first frames determine."""
        keep = torch.zeros(self.image_tokenizer.layout.length, dtype=torch.bool, device=self._execution_device)
        keep[self.image_tokenizer.start_positions(count).to(keep.device)] = True
        return keep

    def _steps(self, context: int, settings: dict[str, Any]) -> int:
        """Steps of a window that begins with so many frames."""
        sampler = self.choose_sampler(settings.get("sampler"), 1)
        changes = {k: v for k, v in settings.items() if k not in ("sampler", "height", "width")}
        known = None
        if context and (count := self.known_tokens(context)):
            keep = self._keep(count)
            known = (torch.zeros(1, len(keep), dtype=torch.int64, device=keep.device), keep)
        return sampler.count_steps(self.transformer, known=known, **self.check_settings(changes, sampler))
