"""Names of the official EBT for clips <-> varkit. No weights were released: this is for what is trained with its code.

Source: alexiglad/EBT: model/vid/ebt.py, train_model.py (0ad3628).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from varkit.checkpoints.formats import StateDict

_INITIAL = {"random_noise": "noise", "zeros": "zeros", "most_recent_embedding": "recent"}
_NEUTRAL = {
    "energy_loss_coeff": 0.0,
    "out_of_bounds_loss_coeff": 0.0,
    "reconstruction_coeff": 1.0,
    "clamp_futures_grad": False,
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
}
"""Settings of experiments that the release gave up: `EnergyVideoAR` has none of them."""
_NOISE = "langevin_dynamics_noise_std"


def energy_video_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the official training -> arguments of `EnergyVideoAR`. Raises ValueError on what it does not have."""
    for name, value in _NEUTRAL.items():
        if official.get(name, value) != value:
            raise ValueError(f"EnergyVideoAR has no {name} other than {value}; got {official[name]}")
    width = official["embedding_dim"]
    latent = {"vae": ((28, 28), 4), "dinov2": ((1, 1), width)}
    grid, dim = latent[official["backbone_type"]]
    more = official.get("randomize_mcmc_num_steps", 0)
    return {
        "num_frames": official["context_length"],
        "grid": grid,
        "latent_dim": dim,
        "hidden_size": width,
        "depth": official["num_transformer_blocks"],
        "num_heads": official["multiheaded_attention_heads"],
        "ffn_multiplier": official.get("ffn_dim_multiplier") or 1.0,
        "variant": official["ebt_type"],
        "num_steps": official["mcmc_num_steps"],
        "start_alpha": official["mcmc_step_size"],
        "initial": _INITIAL[official["denoising_initial_condition"]],
        "langevin_noise": official["langevin_dynamics_noise"],
        "random_alpha": official.get("randomize_mcmc_step_size_scale", 1),
        "repeats": (max(1, official.get("randomize_mcmc_num_steps_min", 0)), more + 1) if more else (1, 1),
        "repeat_last": official.get("randomize_mcmc_num_steps_final_landscape", False),
        "detach": not official["no_mcmc_detach"],
        "truncate": official["truncate_mcmc"],
    }


def ours(key: str) -> str:
    """The name of an official parameter in `EnergyVideoAR`."""
    return key.removeprefix("transformer.").replace("encoder_down_projection.", "project.")


def from_official(state: StateDict) -> StateDict:
    """Without the noise's standard deviation, which is an argument, and the frozen image encoder."""
    return {ours(k): v for k, v in state.items() if k != _NOISE and not k.startswith("image_encoder.")}


def to_official(state: StateDict, model: Any) -> StateDict:
    result = {_NOISE: torch.tensor(float(model.config.langevin_noise))}
    for key, value in state.items():
        own = key == "alpha" or key.startswith("project.")
        name = key.replace("project.", "encoder_down_projection.")
        result[name if own else f"transformer.{key}"] = value
    return result
