"""NBP: from a recorded call to our public classes."""

from __future__ import annotations

from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import nbp as keys
from varkit.checkpoints.files import load_strictly
from varkit.tokenizers.magvit2 import MagViT2, ReleasedFSQ


def tokenizer_of(case: Case, frames: int) -> MagViT2:
    model = MagViT2(num_frames=frames, **keys.tokenizer_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, keys.tokenizer_from_official(case.fixture.state, model), "fixture")
    return model.eval()


@adapter("nbp", "tokenizer", "encode")
def _(case: Case) -> Answers:
    assert case.settings["video_range"] == [0, 1]
    clips = case.inputs["video"] * 2 - 1
    model = tokenizer_of(case, clips.shape[2])
    latent = model.features(clips)
    quantized = model.quantize(latent)
    ids = model.encode(clips)
    return {"latent": latent, "quantized": quantized.features, "ids": ids.view(len(ids), *model.layout.grids[0])}


@adapter("nbp", "tokenizer", "decode")
def _(case: Case) -> Answers:
    assert not case.settings["clamp"]
    ids: Tensor = case.inputs["ids"]
    model = tokenizer_of(case, 1 + 4 * (ids.shape[1] - 1))
    return {"video": (model.decode_features(model.latents(ids.flatten(1))) + 1) / 2}


@adapter("nbp", "fsq", "quantize")
def _(case: Case) -> Answers:
    fsq, z = ReleasedFSQ(case.settings["levels"]), case.inputs["z"]
    values = fsq(z)
    return {"bound": fsq.bound(z), "quantized": values, "ids": fsq.ids(values)}
