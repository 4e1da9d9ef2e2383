"""The KL-VAE of MAR: from a recorded call to our public classes."""

from __future__ import annotations

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import kl_vae as keys
from varkit.checkpoints.files import load_strictly
from varkit.rng import Draw, RecordedRng
from varkit.tokenizers.kl_vae import KLVAE, flatten


def vae_of(case: Case) -> KLVAE:
    scale = case.settings["latent_scale"]
    model = KLVAE(**keys.kl_vae_arguments({**case.fixture.meta["constructor"], "scaling_factor": scale}))
    load_strictly(model, keys.from_official(case.fixture.state, model), "fixture")
    return model.eval()


@adapter("kl-vae", "vae", "encode")
def _(case: Case) -> Answers:
    model = vae_of(case)
    posterior = model.posterior(case.inputs["x"])
    sample = model.draw(posterior, RecordedRng(normal={Draw.LATENT: flatten(case.inputs["noise"])}))
    return {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "mode": posterior.mode(),
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "sample": sample,
        "scaled": model.scaled(sample),
    }


@adapter("kl-vae", "vae", "decode")
def _(case: Case) -> Answers:
    assert not case.settings["clamp"]
    model, z = vae_of(case), case.inputs["z"]
    return {"image": model.to_images(model.scaled(z)), "image_from_scaled": model.to_images(z)}


@adapter("kl-vae", "posterior", "forward")
def _(case: Case) -> Answers:
    posterior = DiagonalGaussianDistribution(case.inputs["moments"])
    return {"logvar": posterior.logvar, "std": posterior.std}
