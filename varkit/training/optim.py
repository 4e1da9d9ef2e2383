"""Learning-rate schedules, weight-decay groups and optimisers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from varkit.config import ConfigError, config
from varkit.training.finetune import layer_scales


@config
class OptimConfig:
    """How one network is optimised (AdamW)."""

    lr: float = 1e-4  # at the plateau, whatever the batch size
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # half a cosine leads there; None: stays
    clip: float = 2.0  # total gradient norm; 0 is off
    warmup_steps: int = 100
    warmup_from: float = 0.005  # fraction of lr at step 0
    schedule: str = "lin0"  # constant, cos, exp, lin, lin0, lin00 or lin<T>; see lr_factor
    final: float = 0.1  # fraction of lr at the last step
    layer_decay: float = 1.0  # factor of lr for each block further from the head; see `layer_scales`

    def __post_init__(self) -> None:
        lr_factor(self.schedule, 0.5, self.final)
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be > 0; got {self.lr}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay must be in (0, 1]; 1 is off; got {self.layer_decay}")


def lr_factor(schedule: str, done: float, final: float) -> float:
    """The learning rate after warm-up, as a fraction of its peak.

    Args:
        schedule: `constant`; `cos` half a cosine to `final`; `lin` / `lin0` / `lin00` flat for the first
            15 / 5 / 0 % and then linear; `lin<T>` two slopes that meet at T, for progressive training;
            `exp` flat for 15 %, then exponential.
        done: share of the steps after warm-up, in [0, 1].
        final: the fraction at the end.
    Raises: ConfigError on an unknown schedule.
    Source: FoundationVision/VAR: utils/lr_control.py.
    """
    rest = 1 - done
    if schedule == "exp" and not final > 0:
        raise ConfigError(f"the exp schedule needs final > 0; got {final}")
    if schedule == "constant":
        return 1.0
    if schedule == "cos":
        return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * done))
    flat = {"lin": 0.15, "exp": 0.15, "lin0": 0.05, "lin00": 0.0}.get(schedule)
    if flat is not None:
        if done < flat:
            return 1.0
        if schedule == "exp":
            return math.exp((done - flat) / (1 - flat) * math.log(final))
        return final + (1 - final) * rest / (1 - flat)
    try:
        knee = float(schedule.removeprefix("lin"))
        if not schedule.startswith("lin") or not 0 < knee < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"unknown lr schedule {schedule!r}; choose constant, cos, exp, lin, lin0, lin00 or lin<T> "
            f"with 0 < T < 1, such as lin0.8"
        ) from None
    middle = (1 + final + (1 - final) * (1 - knee)) / 2
    if done < knee:
        return 1 + (middle - 1) * done / knee
    return final + (middle - final) * rest / (1 - knee)


def lr_and_decay(
    schedule: str,
    step: int,
    *,
    peak_lr: float,
    weight_decay: float,
    weight_decay_end: float,
    warmup_steps: float,
    max_steps: int,
    warmup_from: float,
    final: float,
    lr_scale: float = 1.0,
    decay_scale: float = 1.0,
) -> tuple[float, float]:
    """Learning rate and weight decay of optimiser step `step` (from 0).

    Args:
        warmup_steps: linear from `warmup_from` * peak.   final: fraction of the peak at the last step.
        lr_scale, decay_scale: of the parameter group (decay_scale 0 for groups without decay).
    Source: FoundationVision/VAR: utils/lr_control.py, `lr_wd_annealing`.
    """
    warmup_steps = round(warmup_steps)
    if step < warmup_steps:
        factor = warmup_from + (1 - warmup_from) * step / warmup_steps
    else:
        factor = lr_factor(schedule, (step - warmup_steps) / max(max_steps - 1 - warmup_steps, 1), final)
    done = step / max(max_steps - 1, 1)
    decay = weight_decay_end + (weight_decay - weight_decay_end) * (0.5 + 0.5 * math.cos(math.pi * done))
    return peak_lr * factor * lr_scale, decay * decay_scale


def parameter_groups(module: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameters with weight decay, and without (biases, 1-D tensors, and names in `module.no_decay`).

    With `layer_decay` below 1 each depth has groups of its own, the head's first, and a factor `lr_scale`; so have the
    parts that `module.lr_scales` names, with their factor.
    """
    parts = tuple(getattr(module, "no_decay", ()))
    scales = layer_scales(module, layer_decay) if layer_decay < 1 else {}
    factors: dict[str, float] = getattr(module, "lr_scales", {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.dim() < 2 or name.endswith("bias") or any(p in name for p in parts)
        factor = next((f for part, f in factors.items() if name.startswith(f"{part}.")), 1.0)
        groups.setdefault((-scales.get(name, 1.0) * factor, exempt), []).append(parameter)
    return [
        {"params": groups[key], "decay_scale": 0.0 if key[1] else 1.0, "lr_scale": -key[0]} for key in sorted(groups)
    ]


def make_optimizer(module: nn.Module, recipe: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(module, recipe.layer_decay), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )


def set_schedule(optimizer: Any, recipe: OptimConfig, step: int, max_steps: int) -> float:
    """Write this step's learning rate and weight decay into the optimiser.

    Returns: the learning rate, before each group's `lr_scale`.
    """
    end = recipe.weight_decay if recipe.weight_decay_end is None else recipe.weight_decay_end
    lr, decay = lr_and_decay(
        recipe.schedule,
        step,
        peak_lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        weight_decay_end=end,
        warmup_steps=recipe.warmup_steps,
        max_steps=max_steps,
        warmup_from=recipe.warmup_from,
        final=recipe.final,
    )
    for group in optimizer.param_groups:  # checkpoints of before layer_decay know no lr_scale
        group["lr"], group["weight_decay"] = lr * group.get("lr_scale", 1.0), decay * group["decay_scale"]
    return lr
