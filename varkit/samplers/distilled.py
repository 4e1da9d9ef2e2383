"""Drawing with a distilled student: one pass, several, or with the teacher between two (arXiv 2412.17153, 3.3-3.4).

The sequence starts as noise. At each time t the first t units of it are kept, the others get their ORIGINAL noise back,
and the student predicts them anew. Of its two heads the logits are read for units before `split`, as the likeliest
code's vector, and the continuous head behind. What is decoded are those vectors as they are.

With `teacher_start` s and times (t0, t1): the student's answer at t0 is snapped to codes, the teacher draws units s to
t1 - 1 anew behind the first s, as it always draws, and the student finishes at t1.

Source: microsoft/distilled_decoding: VAR/sample.py, VAR/combine_sample.py,
LlamaGen/autoregressive/sample/eval_fewstep.py (3b95d33).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.generators.distilled import Student
from varkit.generators.var import VARState
from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Draw, Rng
from varkit.samplers.flow_map import nearest_codes, start_noise
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.next_group import Known, SamplerOutput
from varkit.samplers.processors import build_processors

OF_TEACHER = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "min_p")


class Finished(NamedTuple):
    """A student's answer where known positions are as given: ids (B, L); vectors of the continuous head, and of both
    heads joined at the split, (B, L, C)."""

    ids: Tensor
    vectors: Tensor
    sequence: Tensor


def finish(student: Any, x: Tensor, labels: Tensor, t: int | Tensor, split: int, codebook: Tensor) -> Finished:
    """One pass. Args: x: (B, L, C), data in the first t units, noise behind.   split: see the module."""
    known = student.known(t)
    out = student(x, labels, known)
    ids = torch.where(known, nearest_codes(x, codebook), out.logits.argmax(-1))
    vectors = torch.where(known[..., None], x, out.vectors)
    from_logits = (student.units < split)[:, None]
    return Finished(ids, vectors, torch.where(from_logits, codebook[ids].to(vectors), vectors))


@dataclass
class DistilledStep:
    """What `on_step` sees after each pass."""

    step: int
    num_steps: int
    positions: Tensor  # (n,) that were decided
    tokens: Tensor  # (B, L, C) as far as they are decided; after a pass of the teacher, its units and those before
    by: str  # student or teacher


class DistilledSampler(SchedulerMixin, ConfigMixin):
    """Draws with a `Student`. The settings are defaults of a model's folder; `generate` takes any of them anew.

    Args:
        times: of the passes, rising from 0: how many units are kept. (0,) is one step.
        num_steps: the first so many of `times`; None is all.
        split: units before it are read from the logits; None is all of them.
        teacher_start: first unit that the teacher draws anew, below the second of two times; None: no teacher.
        guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p: of the teacher, as in `NextGroupSampler`.
            The student has its teacher's guidance built in.
        official_quirks: the teacher reads known scales and the first of its own without a mask, as released, so that
            they see one another as they never did in its training.
    """

    @register_to_config
    def __init__(
        self,
        times: Sequence[int] = (0,),
        num_steps: int | None = None,
        split: int | None = None,
        teacher_start: int | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        official_quirks: bool = False,
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The configured settings with those `changes` that are not None. Raises ValueError on a bad one."""
        own = {name: value for name, value in self.config.items() if not name.startswith("_")}
        given = {k: v for k, v in changes.items() if v is not None and k in own}
        merged = {**own, **given, "times": tuple((own | given)["times"])}
        times, start = merged["times"], merged["teacher_start"]
        if not times or times[0] != 0 or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"times must rise from 0, such as (0, 5); got {times}")
        if merged["num_steps"] is not None and not 1 <= merged["num_steps"] <= len(times):
            raise ValueError(f"num_steps must be 1 to {len(times)}, the number of times; got {merged['num_steps']}")
        if start is not None and (merged["num_steps"] or len(times)) < 2:
            raise ValueError(
                f"teacher_start goes with two times, before the second of which the teacher draws; got {times}"
            )
        if start is not None and (len(times) > 2 or not 0 <= start < times[1]):
            raise ValueError(f"teacher_start must be below the second of two times; got {start} and {times}")
        strange = [k for k in OF_TEACHER if start is None and k in given and given[k] != own[k]]
        if strange:
            raise ValueError(
                f"{strange[0]} is a setting of the teacher, which takes part with teacher_start= alone; a student has "
                f"its teacher's guidance and filters built in"
            )
        guidance_schedule(merged["guidance_schedule"])
        build_processors(**{k: merged[k] for k in OF_TEACHER[2:]})
        return merged

    def count_steps(self, transformer: Student, known: Known | None = None, **changes: Any) -> int:
        """Passes of student and teacher. Raises ValueError as `generate`."""
        settings = self.settings(**changes)
        times, start = self._times(transformer, settings), settings["teacher_start"]
        if known is not None:
            raise ValueError("a distilled student draws all tokens from noise: it cannot keep known ones")
        return len(times) if start is None else times[1] - start + 1 + (start > 0)

    @staticmethod
    def _times(student: Student, settings: dict[str, Any]) -> tuple[int, ...]:
        times = settings["times"][: settings["num_steps"]]
        if times[-1] >= student.num_units or (settings["split"] or 0) > student.num_units:
            raise ValueError(
                f"this student draws {student.num_units} {student.unit}s: times must be below that, and split at most "
                f"that; got {times} and {settings['split']}"
            )
        return times

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        transformer: Student,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[DistilledStep], None] | None = None,
        teacher: Generator | None = None,
        **changes: Any,
    ) -> SamplerOutput:
        """Draw the vectors (B, L, C) of one image for each row of `cond`.

        Args:
            null: the teacher's unconditional branch; needed where it is guided.
            teacher: needed with teacher_start.   on_step: called after each pass.
            known: must be None.   changes: settings to use instead of the configured ones.
        Raises: ValueError on a bad setting, or on parts with different layouts, before any work.
        """
        settings, count = self.settings(**changes), self.count_steps(transformer, known, **changes)
        transformer.layout.require(tokenizer.layout, "the student", "the tokenizer")
        times, start = self._times(transformer, settings), settings["teacher_start"]
        split = transformer.num_units if settings["split"] is None else settings["split"]
        if start is not None and teacher is None:
            raise ValueError("teacher_start needs the teacher: give the pipeline one (pipeline.teacher = ...)")
        began, step = time.perf_counter(), 0
        noise = start_noise(rng, transformer.layout, Draw.STUDENT_NOISE)  # B L C
        codebook, x = tokenizer.codebook.to(noise), noise

        def tell(positions: Tensor, tokens: Tensor, by: str) -> None:
            nonlocal step
            if on_step is not None:
                on_step(DistilledStep(step, count, positions, tokens, by))
            step += 1

        for i, t in enumerate(times):
            if start is not None and i == 1:
                assert teacher is not None
                ids = nearest_codes(x, codebook)
                draw = TeacherDraw(tokenizer, teacher, cond, null, settings)
                for positions in draw.units(ids, start, t, rng):
                    done = ids[:, : int(positions[-1]) + 1]
                    tell(positions, codebook[done], "teacher")
                x = codebook[ids]
            if start == 0 and i == 0:
                continue  # the teacher draws all that this pass would
            x = finish(transformer, transformer.mix(x, noise, t), cond.labels, t, split, codebook).sequence
            tell((transformer.units >= t).nonzero()[:, 0], x, "student")
        return SamplerOutput(x, count, count, time.perf_counter() - began)


class TeacherDraw:
    """The teacher drawing some of its units anew, behind given ones that it reads in one pass."""

    def __init__(
        self, tokenizer: Tokenizer, teacher: Generator, cond: Cond, null: Cond | None, settings: dict[str, Any]
    ) -> None:
        teacher.layout.require(tokenizer.layout, "the teacher", "the tokenizer")
        self.tokenizer, self.teacher, self.scale = tokenizer, teacher, float(settings["guidance_scale"])
        if self.scale != 1 and null is None:
            raise ValueError(f"guidance_scale {self.scale:g} needs the unconditional branch (null=)")
        self.schedule = guidance_schedule(settings["guidance_schedule"])
        self.processors = build_processors(**{k: settings[k] for k in OF_TEACHER[2:]})
        self.state = teacher.start(cond, null if self.scale != 1 else None)
        if isinstance(self.state, VARState):
            self.state.block_causal = not settings["official_quirks"]

    def units(self, ids: Tensor, start: int, stop: int, rng: Rng) -> Iterator[Tensor]:
        """Draw units start to stop - 1 into `ids` (B, L), in place; yields the positions of each when it is there."""
        groups = self.teacher.schedule()
        uniform = rng.uniform(torch.arange(ids.shape[1]), Draw.TOKEN)
        for unit in range(start, stop):
            positions = groups[unit]
            read = torch.cat(groups[: unit + 1]) if unit == start else positions  # with all before, at first
            predictive = self.teacher.predict(self.state, self.tokenizer.embed(ids)[:, read], read)
            assert isinstance(predictive, Categorical)
            if self.scale != 1:
                predictive = predictive.guide(self.schedule(self.scale, unit, len(groups) - 1))
            own = Categorical(predictive.logits[:, -len(positions) :]).probs(self.processors)
            ids[:, positions] = pick(own, uniform[:, positions])
            self.teacher.append(self.state, ids[:, read], read)
            yield positions
