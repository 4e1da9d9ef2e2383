"""LoRA (Hu et al., arXiv 2106.09685) through peft: adding it, merging it for the export, writing the adapter."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from varkit.config import ConfigError, config

ADAPTER = "adapter"
"""Folder, beside the parts of an exported pipeline, of the adapter as peft writes it."""


@config
class LoRA:
    """Low-rank additions to linear layers: W + alpha / rank * B A, with B = 0 at the start."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what A reads
    targets: tuple[str, ...] = ()  # name patterns of linear layers; empty: the generator's own (attention and MLP)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"objective.lora.rank must be at least 1; got {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"objective.lora.alpha must be > 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"objective.lora.dropout must be in [0, 1); got {self.dropout}")


def require_peft() -> None:
    """Raises ImportError naming the extra."""
    if find_spec("peft") is None:
        raise ImportError('objective.lora needs the package peft: pip install "varkit[lora]"')


def targeted(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers that match, without those whose weight is frozen.

    Raises: ConfigError when a pattern matches no linear layer, or when all that match are frozen.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(linear, pattern)
        if not matches:
            raise ConfigError(
                f"objective.lora.targets: {pattern!r} matches no linear layer; there are {', '.join(list(linear)[:6])}"
            )
        found.update(matches)
    kept = [name for name in linear if name in found and linear[name].weight.requires_grad]
    if not kept:
        raise ConfigError("objective.lora.targets are all frozen by objective.freeze; leave some to train")
    return kept


def add_adapter(model: Any, plan: LoRA, beside: Sequence[str] = ()) -> str:
    """Put an adapter around linear layers, in place; only it is trained from now on.

    Args:
        model: has `lora_targets`, used when the plan names none.
        beside: parameters that stay trained as well, unless they are frozen.
    Returns: one line for the log.   Raises: ConfigError, ImportError.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    names = targeted(model, plan.targets or model.lora_targets)
    parameters = dict(model.named_parameters())
    kept = [name for name in beside if parameters[name].requires_grad]
    alike = [  # peft matches ends of names: a control encoder has blocks as the generator has
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in names and name.endswith(tuple(f".{n}" for n in names))
    ]
    settings = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]
        lora_dropout=plan.dropout,
        target_modules=names,  # type: ignore[arg-type]
        exclude_modules=alike or None,
    )
    inject_adapter_in_model(settings, model)  # also freezes all the rest
    settings.modules_to_save = [name.rpartition(".")[0] for name in kept] or None
    for name in kept:
        model.get_parameter(name).requires_grad_(True)
    also = f"; {', '.join(kept)} trained in full" if kept else ""
    return f"LoRA of rank {plan.rank} on {len(names)} linear layers{also}"


def merged(model: Any) -> Any:
    """A copy with the adapter added into the weights: the class and the keys of the model without LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            result.set_submodule(name, module.get_base_layer())
    del result.peft_config
    return result


def write_adapter(model: Any, folder: Path, source: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which `peft.PeftModel` opens on the starting model.

    Parameters trained in full are in it (`modules_to_save`); the starting model must have the new number of classes.

    Args: source: what training started from, noted in the configuration.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = copy.copy(model.peft_config["default"])
    settings.base_model_name_or_path = source
    state = get_peft_model_state_dict(model)
    for name in settings.modules_to_save or ():
        state |= {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
