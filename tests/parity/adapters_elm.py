"""Adapters of ELM: they map names and call public classes."""

from __future__ import annotations

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import elm as keys
from varkit.checkpoints.files import load_strictly
from varkit.tokenizers.binary_autoencoder import BinaryAutoencoder


def autoencoder_of(case: Case) -> BinaryAutoencoder:
    arguments = keys.autoencoder_arguments(case.fixture.meta["constructor"], case.settings.get("token_each", 2))
    model = BinaryAutoencoder(**arguments, threshold=case.settings.get("threshold", 0.5))
    load_strictly(model, keys.autoencoder_from_official(case.fixture.state), "fixture")
    return model.eval()


@adapter("elm", "autoencoder", "encode")
def _(case: Case) -> Answers:
    model = autoencoder_of(case)
    hidden = model.features(keys.images_from_official(case.inputs["image"]))
    _, quantized = model(keys.images_from_official(case.inputs["image"]))
    return {
        "hidden": hidden,
        "bit_prob": quantized.residuals[0],
        "bits": quantized.bits,
        "quant": quantized.features,
    }


@adapter("elm", "autoencoder", "bits_to_indices")
def _(case: Case) -> Answers:
    if case.settings["bit_order"] != "msb_first":
        raise ValueError("only the highest bit first")
    return {"indices": autoencoder_of(case).ids(case.inputs["bits"])}


@adapter("elm", "autoencoder", "decode")
def _(case: Case) -> Answers:
    model = autoencoder_of(case)
    latents = model.latents(model.ids(case.inputs["bits"]))
    return {"image": keys.images_to_official(model.decode_features(latents))}


@adapter("elm", "autoencoder", "forward")
def _(case: Case) -> Answers:
    image, quantized = autoencoder_of(case)(keys.images_from_official(case.inputs["image"]))
    return {"image": keys.images_to_official(image), "codebook_loss": quantized.code_loss.reshape(1)}
