"""The one training loop, on accelerate, for every objective."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from varkit.compiler import require_compiler
from varkit.config import ConfigError
from varkit.data.clip_rules import ClipRule
from varkit.data.clips import CLIP_DATASETS, ClipDataset, open_clips
from varkit.data.codes import CodeSet, is_code_folder
from varkit.data.images import ImageDataset, collate, open_images
from varkit.data.trajectories import open_codes
from varkit.data.transforms import ImageTransform
from varkit.interfaces import Objective
from varkit.pictures import grid, save_png, to_pil
from varkit.rng import Rng
from varkit.training.batches import StepBatches
from varkit.training.checkpoint import Checkpoints, replace_folder
from varkit.training.flops import FlopMeter
from varkit.training.logbook import Window, drop_later_lines, require_tracker, tracker_options, write_line
from varkit.training.objectives import build_objective, takes_clips
from varkit.training.optim import make_optimizer, set_schedule
from varkit.training.recipe import ClipsConfig, Recipe, recipe_values
from varkit.training.restore import restore, saved_processes
from varkit.training.sharding import (
    ShardedAverage,
    exchanged,
    export_whole,
    gather_for_methods,
    local,
    release,
    save_average,
    start_sharding,
    whole,
)
from varkit.training.sync import anyone, place, require_all_processes, summed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    folder: Path
    step: int  # optimiser steps taken in all
    finished: bool  # False: stopped by a signal, to be resumed
    seconds: float
    model: Path | None  # the exported model, once finished


class Progress:
    """The part of the loop's state that is no network: registered with accelerate, saved with it."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.bad_steps = 0  # skipped in all
        self.bad_in_a_row = 0
        self.run_id = uuid.uuid4().hex[:12]  # by which a tracker finds a resumed run

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class StopSignal:
    """SIGINT and SIGTERM ask the loop to save and end; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = signal.Signals(number).name

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(recipe: Recipe, *, resume: bool = False) -> TrainResult:
    """Run a recipe to its end, or to a signal.

    Writes into `recipe.folder`: recipe.yaml, metrics.jsonl, samples/, checkpoints/, and model/ at the end.

    Args: resume: continue from the newest checkpoint there.
    Raises: ConfigError or ValueError before any work when data, model or folder do not fit.
    """
    return Trainer(recipe, resume).run()


class Trainer:
    """Sets a run up, then steps through it. `run` reads top to bottom."""

    def __init__(self, recipe: Recipe, resume: bool) -> None:
        self.recipe, self.loop, self.folder = recipe, recipe.loop, recipe.folder
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.loop.keep)
        self._check_folder(resume)
        require_tracker(self.loop.tracker)
        self.clips = self._takes_clips()
        self.dataset = self._open(recipe.data.train, recipe.data.train_split)
        self.validation: ImageDataset | ClipDataset | CodeSet | None = None
        if recipe.data.validation is not None:
            self.validation = self._open(recipe.data.validation, recipe.data.validation_split)
            self._check_classes(self.dataset.classes, self.validation.classes)
        self.accelerator = Accelerator(
            mixed_precision=self.loop.precision,
            log_with=None if self.loop.tracker == "none" else self.loop.tracker,
            project_dir=self.folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        require_all_processes()
        if self.loop.compile:
            require_compiler(self.accelerator.device)
        set_seed(self.loop.seed)
        self.objective: Objective = self._build()
        self.objective.max_steps = self.loop.steps
        self._check_data()
        if place()[0] > 0:  # the same networks everywhere, another dropout on each process
            set_seed(self.loop.seed, device_specific=True)
        self.objective.train()
        if self.loop.channels_last:
            self.objective.to(memory_format=torch.channels_last)
        self._set_transforms()
        self.phases = self.objective.all_phases()
        self.sharded = start_sharding(self.accelerator, self.objective, self.loop)
        self.optim = {p: self.objective.optim(p, recipe.optim) for p in self.phases}
        optimizers = [make_optimizer(self.objective.trained(p), self.optim[p]) for p in self.phases]
        if self.loop.compile:
            self.objective.trained("main").compile()  # in place: parameter names stay
        self.model, *prepared = self.accelerator.prepare(self.objective, *optimizers)
        self.optimizers = dict(zip(self.phases, prepared, strict=True))
        self.parameters = {
            p: [w for w in self.objective.trained(p).parameters() if w.requires_grad] for p in self.phases
        }
        if self.sharded:
            gather_for_methods(self.objective)
        self.progress = Progress()
        self.rate = 0.0  # learning rate of the step, before factors of parameter groups
        self.accelerator.register_for_checkpointing(self.progress)
        self.ema: EMAModel | None = None
        self.weights = list(self.objective.trained("main").parameters())  # while no forward has gathered shards
        if self.loop.ema_decay:
            self.ema = (ShardedAverage if self.sharded else EMAModel)(self.weights, decay=self.loop.ema_decay)
            self.accelerator.register_for_checkpointing(self.ema)
        latest = self.checkpoints.latest() if resume else None
        if latest is not None:
            restore(self.accelerator, self.objective, self.ema, latest, self.loop.seed + self.checkpoints.steps()[-1])
            before, now = saved_processes(latest), self.accelerator.num_processes
            self._say(f"resumed from {latest}" + (f" (of {before} processes, now {now})" if before != now else ""))
        if self.ema is not None and not self.sharded:
            self.ema.to(self.accelerator.device)
        self.flops = FlopMeter(self.accelerator.device, self.loop.precision, enabled=not self.loop.compile)

    # ---- set-up -------------------------------------------------------------------------------------------

    def _check_folder(self, resume: bool) -> None:
        latest = self.checkpoints.latest()
        if resume and latest is None:
            raise ConfigError(f"nothing to resume: {self.checkpoints.folder} holds no checkpoint")
        if not resume and latest is not None:
            raise ConfigError(
                f"{self.folder} already holds a run ({latest.name}); continue it with --resume, or choose another "
                f"folder with out=..."
            )

    @staticmethod
    def _check_classes(train: list[str], validation: list[str]) -> None:
        """Ids are positions: a class must stand at the same place in both, where both know names."""
        numbered = any(classes == [str(i) for i in range(len(classes))] for classes in (train, validation))
        for position, (ours, theirs) in enumerate(zip(train, validation, strict=False)):
            if ours != theirs and not numbered:
                raise ConfigError(
                    f"data.validation: class {position} is {theirs!r} there and {ours!r} in data.train, ids would not "
                    "agree; give one source with splits (train_split, validation_split), the same classes in both, or "
                    "data.validation=null to train without"
                )

    def _build(self) -> Objective:
        return build_objective(self.recipe.objective, self.dataset.classes)

    def _check_data(self) -> None:
        """Raises ConfigError or ValueError when token files or captions do not fit what is trained."""
        for name, data in (("train", self.dataset), ("validation", self.validation)):
            if data is not None:
                self.objective.check_texts(f"data.{name}", data.texts)
            if isinstance(data, ImageDataset | ClipDataset):
                self.objective.check_images(data.source)
            if isinstance(data, CodeSet):
                self.objective.check_codes(data.info)
                if self.recipe.data.flip and name == "train":
                    raise ConfigError(
                        "data.flip mirrors images; the views of token files are made before, by `varkit tokenize "
                        "--flip`: set data.flip=false"
                    )

    def _takes_clips(self) -> bool:
        """Whether the objective takes clips. Raises ConfigError when the recipe does not go with that."""
        clips, data = takes_clips(self.recipe.objective), self.recipe.data
        if clips and self.loop.channels_last:
            raise ConfigError("loop.channels_last is for images; this objective takes clips: leave it out")
        if not clips and data.clips is not None:
            raise ConfigError(f"data.clips is for objectives of clips; {self.recipe.objective.name} takes images here")
        if not clips and (named := {data.train, data.validation} & set(CLIP_DATASETS)):
            raise ConfigError(f"data: {named.pop()} is a set of clips; {self.recipe.objective.name} takes images here")
        return clips

    def _open(self, source: str, split: str) -> ImageDataset | ClipDataset | CodeSet:
        data = self.recipe.data
        if is_code_folder(source):
            return open_codes(source, random_view=source == data.train, seed=self.loop.seed)
        if self.clips:
            fold = 1 if data.clips is None else data.clips.fold
            return open_clips(source, split=split, root=data.root, frames=1, fold=fold)
        return open_images(source, split=split, root=data.root)

    def _set_transforms(self) -> None:
        data = self.recipe.data
        size = self.objective.image_size
        moving = ImageTransform(size, mode=data.mode, enlarge=data.enlarge, flip=data.flip, seed=self.loop.seed)
        held: dict[str, Any] = {"crop": "center", "shift": "squash"}
        still = ImageTransform(size, mode=held.get(data.mode, data.mode), enlarge=data.enlarge)
        for dataset, transform in ((self.dataset, moving), (self.validation, still)):
            if isinstance(dataset, ImageDataset):
                dataset.transform = transform
            elif isinstance(dataset, ClipDataset):
                clips = data.clips or ClipsConfig()
                rule = ClipRule(
                    frames=self.objective.num_frames or 1,
                    stride=clips.stride,
                    start="random" if dataset is self.dataset else clips.held_out,
                    short=clips.short,
                    seed=self.loop.seed,
                )
                dataset.set_clips(rule, clips.fps, transform)

    @property
    def held_out_batch(self) -> int:
        """Held-out images, or clips of as many frames in all, that go through the networks at once."""
        return max(128 // (self.objective.num_frames or 1), 1)

    def _loader(self) -> DataLoader[Any]:
        a = self.accelerator
        batches = StepBatches(
            len(self.dataset),
            self.loop.batch_size,
            start=self.progress.step,
            stop=self.loop.steps,
            seed=self.loop.seed,
            accumulation=self.loop.accumulation,
            process=a.process_index,
            processes=a.num_processes,
        )
        workers = self.recipe.data.workers
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=a.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.loop.seed),  # leave dropout's alone: a resumed run must match
        )

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def _begin(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / ".recipe.yaml.part"
        part.write_text(yaml.safe_dump(recipe_values(self.recipe), sort_keys=False))
        part.replace(self.folder / "recipe.yaml")
        dropped = drop_later_lines(self.folder / "metrics.jsonl", self.progress.step)
        if dropped:
            self._say(f"dropped {dropped} lines of metrics.jsonl after step {self.progress.step}: they are run again")
        count = sum(p.numel() for p in self.objective.trained("main").parameters())
        what = "clips" if self.clips else "images"
        for note in self.objective.notes:
            self._say(note)
        self._say(
            f"training {self.recipe.name}: {count / 1e6:.2f} M parameters, {len(self.dataset)} {what} of "
            f"{len(self.dataset.classes)} classes, {self.loop.steps} steps of {self.loop.batch_size}, "
            f"{self.loop.precision} on {self.accelerator.device} x {self.accelerator.num_processes}, into {self.folder}"
        )
        if not self.flops.enabled:
            self._say("loop.compile hides operations: no tflops or mfu is logged (--dry-run counts them)")

    # ---- the run ------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        self._begin()
        if self.loop.tracker != "none":
            self.accelerator.init_trackers(
                self.recipe.name,
                config={"recipe": json.dumps(recipe_values(self.recipe))},
                init_kwargs=tracker_options(self.loop.tracker, self.progress.run_id, self.progress.step),
            )
        stop, began = StopSignal(), time.perf_counter() - self.progress.seconds
        first, window = self.progress.step, Window()
        loader = iter(self._loader())
        bar = tqdm(
            total=self.loop.steps,
            initial=first,
            unit="step",
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )
        with stop.listening(), bar:
            for step in range(first, self.loop.steps):
                asked = time.perf_counter()
                micros = [self._move(next(loader)) for _ in range(self.loop.accumulation)]
                waited = time.perf_counter() - asked
                phases = self.objective.phases(step)
                window.add(self.flops.watch(step, phases, partial(self.step, step, micros)), waited)
                self.progress.step, self.progress.seconds = step + 1, time.perf_counter() - began
                bar.update()
                done, last = step + 1, step + 1 == self.loop.steps
                if done % self.loop.log_every == 0 or last:
                    self._log(done, window, bar)
                if last or self._due(done, self.loop.validate_every):
                    self._validate(done)
                if last or self._due(done, self.loop.sample_every):
                    self._sample(done)
                stopping = anyone(stop.received is not None, self.accelerator.device)
                if last or stopping or self._due(done, self.loop.save_every):
                    self._save(done)
                if stopping and not last:
                    self._say(
                        f"{stop.received or 'signal'}: saved step {done} of {self.loop.steps}; continue with --resume"
                    )
                    self.accelerator.end_training()
                    return TrainResult(self.folder, done, False, self.progress.seconds, None)
        model = self._export()
        self.accelerator.end_training()
        self._say(f"finished {self.loop.steps} steps in {self.progress.seconds / 60:.1f} min; the model is {model}")
        return TrainResult(self.folder, self.progress.step, True, self.progress.seconds, model)

    def step(self, step: int, micros: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimiser step: each phase over all micro-batches. Returns means of the named losses."""
        numbers: dict[str, Tensor] = {}
        for phase in self.objective.phases(step):
            optimizer, optim = self.optimizers[phase], self.optim[phase]
            rate = set_schedule(optimizer, optim, step, self.loop.steps)
            self.rate = rate if phase == "main" else self.rate
            for name, weights in self.parameters.items():
                for weight in weights:
                    weight.requires_grad_(name == phase)
            for i, batch in enumerate(micros):
                rng = Rng.for_keys(self.loop.seed, batch["keys"])
                sync = i == len(micros) - 1
                with nullcontext() if sync else self.accelerator.no_sync(self.model):
                    with self.accelerator.autocast():  # FSDP2's forward has none of its own
                        losses = self.model(batch, phase, step, self.loop.steps, rng)
                    self.accelerator.backward(losses["loss"] / len(micros))
                for name, value in losses.items():
                    key = name if phase == "main" else f"{phase}/{name}"
                    numbers[key] = numbers.get(key, 0) + value.detach() / len(micros)
            norm = self.accelerator.clip_grad_norm_(self.parameters[phase], optim.clip or float("inf"))
            prefix = "" if phase == "main" else f"{phase}/"
            numbers[f"{prefix}grad_norm"] = whole(norm)
            if bad := self._not_finite(phase, numbers):
                self._skip(step, phase, bad)
                return {}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.bad_in_a_row = 0
        for weight in self.parameters["main"]:  # EMAModel copies, not averages, what takes no gradient
            weight.requires_grad_(True)
        self.objective.after_step(step, Rng.for_keys(self.loop.seed, torch.tensor([0])))
        if self.ema is not None:
            self.ema.step(self.weights)
        return numbers

    def _not_finite(self, phase: str, numbers: dict[str, Tensor]) -> list[str]:
        """Names of this phase's losses (and `grad_norm`) that are not finite on any process."""
        names = sorted(n for n in numbers if (n.partition("/")[0] == phase) == (phase != "main"))
        if self.accelerator.scaler is not None:  # fp16: the scaler answers gradients that overflow
            names = [n for n in names if not n.endswith("grad_norm")]
        bad = torch.stack([~torch.isfinite(numbers[n].float()) for n in names]).float()
        return [name for name, count in zip(names, summed(bad).tolist(), strict=True) if count]

    def _skip(self, step: int, phase: str, bad: list[str]) -> None:
        """Forget a step whose loss or gradient is not finite; too many in a row end the run.

        Raises: FloatingPointError naming the step, the losses and the last good checkpoint.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for weight in self.parameters["main"]:
            weight.requires_grad_(True)
        self.objective.discard_step()
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        row, what = self.progress.bad_in_a_row, f"step {step + 1}, phase {phase}: not finite: {', '.join(bad)}"
        if row >= self.loop.max_bad_steps:
            raise FloatingPointError(
                f"{what}; {row} such steps in a row (loop.max_bad_steps); the last good checkpoint is "
                f"{self.checkpoints.latest() or 'none'}. Lower optim.lr, or train with loop.precision=no"
            )
        self._say(f"{what}; the step is skipped ({row} in a row, {self.progress.bad_steps} in all)")

    def _move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images and labels to the device; keys stay on the host, where their few numbers are drawn."""
        device = self.accelerator.device
        stay = {k: v for k, v in batch.items() if k == "keys" or not isinstance(v, Tensor)}  # texts are strings
        moved = {k: v if k in stay else v.to(device, non_blocking=True) for k, v in batch.items()}
        if self.loop.channels_last and "images" in moved:
            moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
        return moved

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    # ---- what is written ----------------------------------------------------------------------------------

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            write_line(self.folder / "metrics.jsonl", step, numbers)
        self.accelerator.log(numbers, step=step)

    def _log(self, step: int, window: Window, bar: Any) -> None:
        waited = window.waited
        numbers, seconds, steps = window.close()
        speed = steps * self.loop.batch_size / seconds
        numbers |= self.objective.statistics()
        numbers |= {
            "lr": self.rate,
            "images_per_second": speed,
            "data_wait": waited / seconds,
            "bad_steps": self.progress.bad_steps,
            "seconds": self.progress.seconds,
            **self.flops.speed(seconds),
        }
        self._write(step, numbers)
        left = (self.loop.steps - step) * self.loop.batch_size / speed / 60
        text = f"loss {numbers.get('loss', float('nan')):.4f}  {speed:.0f} images/s"
        if bar.disable:
            self._say(f"step {step}/{self.loop.steps}  {text}  {left:.1f} min left")
        else:
            bar.set_postfix_str(text)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the current ones, in eval mode."""
        self.objective.eval()
        average = nullcontext() if self.ema is None else exchanged(self.weights, self.ema.shadow_params)
        try:
            # Other shapes than in training: not worth compiling again.
            with average, torch.no_grad(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            release(self.objective)
            self.objective.train()

    def _takes_part(self) -> bool:
        """Whether this process validates and draws: the main one, or all that hold a shard of the weights."""
        return self.sharded or self.accelerator.is_main_process

    def _held_out(self, count: int, batch_size: int) -> Iterator[tuple[dict[str, Tensor], Rng]]:
        """The first `count` held-out images (training images when there are none), cut in batches."""
        data = self.validation or self.dataset
        for first in range(0, min(count, len(data)), batch_size):
            entries = list(range(first, min(first + batch_size, count, len(data))))
            batch = self._move(collate(data.__getitems__(entries)))
            yield batch, Rng.for_keys(self.loop.seed, batch["keys"])

    def _validate(self, step: int) -> None:
        if self.validation is None or not self._takes_part():
            self.accelerator.wait_for_everyone()
            return
        sums: dict[str, float] = {}
        images = 0
        with self._averaged():
            for batch, rng in self._held_out(self.loop.validate_images, self.held_out_batch):
                count = len(batch["labels"])
                for name, value in self.objective.validate(batch, rng).items():
                    sums[f"validation/{name}"] = sums.get(f"validation/{name}", 0.0) + float(value) * count
                images += count
        numbers = {name: total / images for name, total in sums.items()}
        self._write(step, numbers)
        self._say(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        self.accelerator.wait_for_everyone()

    def _sample(self, step: int) -> None:
        if self._takes_part():
            with self._averaged():
                batch, rng = next(self._held_out(16, 16))
                images = self.objective.pictures(batch, rng)
            if images is not None and self.accelerator.is_main_process:
                sheet = grid(to_pil(images), self.picture_columns(len(images)))
                save_png(sheet, self.folder / "samples" / f"step-{step:08d}.png", {"step": step})
        self.accelerator.wait_for_everyone()

    def picture_columns(self, count: int) -> int:
        """Of a sample sheet of so many pictures."""
        return self.objective.columns or (8 if count % 10 else 10)

    def _require_finite(self, step: int) -> None:
        named = dict(self.objective.named_parameters())
        bad = summed(torch.stack([~local(w).isfinite().all() for w in named.values()]).float()).tolist()
        for name, count in zip(named, bad, strict=True):
            if count:  # on any process, and so on all of them
                raise FloatingPointError(
                    f"{name} is not finite after step {step}; no checkpoint is written of it, and the last good one is "
                    f"{self.checkpoints.latest() or 'none'}. Lower optim.lr, or train with loop.precision=no"
                )

    def _save(self, step: int) -> None:
        self._require_finite(step)

        def write(part: Path) -> None:
            self.accelerator.save_state(str(part))
            if self.sharded and self.ema is not None:
                save_average(self.ema, part)

        a = self.accelerator
        path = self.checkpoints.save(step, write, a.is_main_process, a.wait_for_everyone)
        self._say(f"saved {path}")

    def _export(self) -> Path:
        path, part = self.folder / "model", self.folder / ".part-model"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(part, ignore_errors=True)
        if self._takes_part():
            with self._averaged():
                if self.sharded:
                    export_whole(self.objective, self._build, part, main)
                else:
                    self.objective.export(part)
        if main:
            replace_folder(part, path)
        self.accelerator.wait_for_everyone()
        return path
