"""Adapters of the systems `titok` and `rar`: they map names and call public classes."""

from __future__ import annotations

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import maskgit_vqgan as vqgan_keys
from varkit.checkpoints.files import load_strictly
from varkit.tokenizers.maskgit_vqgan import MaskGitVQGAN


def vqgan_of(case: Case) -> MaskGitVQGAN:
    model = MaskGitVQGAN(**vqgan_keys.vqgan_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


@adapter("titok", "vqgan", "encode")
def _(case: Case) -> Answers:
    model = vqgan_of(case)
    images = vqgan_keys.images_from_official(case.inputs["image"])
    return {"hidden": model.features(images), "ids": model.encode(images)}


@adapter("titok", "vqgan", "decode")
def _(case: Case) -> Answers:
    model = vqgan_of(case)
    return {"image": vqgan_keys.images_to_official(model.decode_features(model.maps(case.inputs["ids"])))}
