"""EBT for clips: from a recorded call to our public classes."""

from __future__ import annotations

import torch

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import energy_video as keys
from varkit.checkpoints.files import load_strictly
from varkit.generators.energy_video import EnergyVideoAR
from varkit.heads.energy import descend


def model_of(case: Case) -> EnergyVideoAR:
    model = EnergyVideoAR(**keys.energy_video_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, keys.from_official(case.fixture.state), "fixture")
    back = keys.to_official(model.state_dict(), model)
    assert back.keys() == case.fixture.state.keys()
    for name, tensor in case.fixture.state.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)
    return model.eval()


@adapter("ebwm", "energy_model", "energy")
@torch.no_grad()
def _(case: Case) -> Answers:
    if case.settings["start_pos"] != 0:
        raise ValueError(f"frames are read from the first on; got start_pos {case.settings['start_pos']}")
    frames, candidates = case.inputs["embeddings"].chunk(2, 1)
    return {"energy": model_of(case)(frames, candidates, case.settings["mcmc_step"])[..., None]}


@adapter("ebwm", "energy_model", "infer")
@torch.no_grad()
def _(case: Case) -> Answers:
    model, s, given = model_of(case), case.settings, case.inputs
    if (s["learning"], s["no_randomness"], s["initial"]) != (False, True, "given"):
        raise ValueError("recorded descents start from given candidates and draw nothing")
    steps = model.landscapes()
    assert len(steps) == s["num_steps"]
    descent = descend(lambda x, k, i: model(given["context"], x, k), given["initial"], steps, model.step_size())
    answers = {f"pred_{i}": x for i, x in enumerate(descent.candidates)}
    return answers | {f"energy_{i}": e.reshape(-1, 1) for i, e in enumerate(descent.energies)}


@adapter("ebwm", "energy_model", "train")
def _(case: Case) -> Answers:
    model, s, given = model_of(case).train(), case.settings, case.inputs
    if (s["phase"], s["learning"], s["initial"]) != ("train", True, "given"):
        raise ValueError("recorded training starts from given candidates")
    losses, _descent = model.loss_at(given["sequence"], given["initial"], model.landscapes(), model.step_size())
    losses["loss"].backward()
    gradients = {keys.ours(k): p.grad for k, p in model.named_parameters()}
    answers = {name: gradients[keys.ours(key)] for name, key in s["gradients"].items()}
    answers["grad_alpha"] = answers["grad_alpha"].reshape(1)
    return answers | {
        "loss": losses["loss"].reshape(1),
        "initial_loss": losses["loss_first"].reshape(1),
        "final_step_loss": losses["loss_last"].reshape(1),
    }
