"""Training what control images steer: maps of the images at hand, a network added to trained weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_control import SMALL, tokenizer, var
from varkit import AutoPipeline
from varkit.conditioning.control import Control
from varkit.config import ConfigError
from varkit.data.codes import CodeInfo
from varkit.pipelines.auto import assemble
from varkit.rng import Rng
from varkit.training.finetune import layer_scales
from varkit.training.objectives import build_objective, objective_config

CANNY = {"kinds": ["canny"], "network": SMALL}


def objective(folder: Path, **changes: Any) -> Any:
    values = {"name": "next-scale", "tokenizer": str(folder), "init_from": str(folder), "control": CANNY, **changes}
    return build_objective(objective_config(values), ["0", "1", "2"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without control, saved."""
    folder = tmp_path_factory.mktemp("plain")
    assemble(var(control=None), tokenizer(), {}).save_pretrained(folder)
    return folder


def batch(count: int = 3) -> dict[str, Tensor]:
    """White rectangles of several sizes on black."""
    images = torch.full((count, 3, 16, 24), -1.0)
    for i in range(count):
        images[i, :, 4 : 8 + i, 3 : 12 + 3 * i] = 1
    return {"images": images, "labels": torch.arange(count) % 3}


def loss(own: Any, rows: dict[str, Tensor]) -> Tensor:
    return own(rows, "main", 0, 10, Rng.from_seed(0, len(rows["labels"])))["loss"]


def test_maps_are_made_of_the_images_of_the_batch(plain: Path) -> None:
    own = objective(plain)
    cond = own.cond(batch())
    assert cond.control.shape == (3, 1, 3, 16, 24) and cond.control.unique().tolist() == [-1, 1]
    assert cond.control_weight.tolist() == [[1]] * 3 and cond.labels.tolist() == [0, 1, 2]
    edges = cond.control[0, 0, 0] > 0
    assert edges[3:10, 2:14].any() and not edges[10:].any() and not edges[:, 14:].any()
    assert not edges[5:7, 5:10].any()
    flipped = own.cond({**batch(), "images": batch()["images"].flip(3)})
    edges = flipped.control[0, 0, 0] > 0
    assert edges[3:10, 11:22].any() and not edges[:, :10].any()
    strict = objective(plain, control={**CANNY, "options": {"canny": {"low": 5000, "high": 5000}}})
    assert strict.cond(batch()).control.max() == -1


def test_training_starts_as_the_model_was_and_learns_from_the_map(plain: Path, tmp_path: Path) -> None:
    own, without = objective(plain), objective(plain, control=None)
    assert "new parameters that read canny; at first they add nothing" in own.notes[1]
    own.model.eval(), without.model.eval()
    assert torch.equal(loss(own, batch()), loss(without, batch()))
    own.train()
    optimizer = torch.optim.Adam([p for n, p in own.named_parameters() if ".controller." in n], lr=0.02)
    first = [loss(own, batch()).item()]
    for _ in range(12):
        step = loss(own, batch())
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
        first.append(step.item())
    assert first[-1] < first[0] - 0.05
    pictures = own.pictures(batch(), Rng.from_seed(0, 3))
    assert pictures.shape == (6, 3, 16, 24)
    assert torch.equal(pictures[0::2].float(), own.cond(batch()).control[:, 0])
    own.export(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path).transformer
    assert again.takes == {"class", "control"} and again.controller.kinds == ("canny",)
    state = own.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    further = objective(plain, init_from=str(tmp_path), control={"kinds": ["canny"]})
    assert "goes on with the network that there is" in further.notes[1]
    with pytest.raises(ConfigError, match=r"give objective\.control\.kinds, such as"):
        objective(plain, init_from=str(tmp_path), control=None)
    with pytest.raises(ConfigError, match="leave network out"):
        objective(plain, init_from=str(tmp_path), control={**CANNY, "network": {"encoder": "vit-small"}})


def test_what_is_new_learns_at_the_full_rate(plain: Path) -> None:
    own = objective(plain)
    scales = layer_scales(own.model, 0.5)
    assert {v for k, v in scales.items() if k.startswith("controller.")} == {1.0} and scales["pos_1LC"] < 0.2


def test_an_encoder_is_loaded_and_kept_unless_asked_otherwise(plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = Control(16, 3, encoder={**SMALL["encoder"], "grid": 3}).encoder
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "encoder.pth"
    torch.save({**trained.state_dict(), "head.weight": torch.zeros(2, 12)}, path)
    for official in (False, True):
        plan = {**CANNY, "encoder_weights": str(path), "official_initialisation": official}
        encoder = objective(plain, control=plan).model.controller.encoder
        same = {k for k, v in encoder.state_dict().items() if v.equal(trained.state_dict()[k])}
        assert "pos_embed" not in same and encoder.pos_embed.shape[1] == 5  # interpolated
        linear = {k for k in same if "qkv" in k or "fc1" in k}
        assert bool(linear) is not official and {"patch_embed.proj.weight", "norm.bias", "cls_token"} <= same
    torch.save({k: v for k, v in trained.state_dict().items() if k != "norm.bias"}, path)
    with pytest.raises(ValueError, match=r"norm\.bias"):
        objective(plain, control={**CANNY, "encoder_weights": str(path)})


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"kinds": []}, "kinds is empty"),
        ({**CANNY, "kinds": ["cany"]}, "did you mean 'canny'"),
        ({**CANNY, "options": {"hed": {}}}, "objective.control.options.hed"),
        ({**CANNY, "options": {"canny": {"lo": 1}}}, "no option lo"),
        ({**CANNY, "network": {"encoder": "resnet"}}, "objective.control.network: no control encoder"),
        ({**CANNY, "network": {"encoders": "vit-small"}}, "encoders"),
        ({**CANNY, "encoder_weights": "no_such_model"}, "no such file"),
    ],
)
def test_a_bad_plan_is_refused(plain: Path, control: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(plain, control=control)


def test_token_files_hold_no_images_to_extract_from(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = objective(plain)
    monkeypatch.setattr("varkit.training.objectives.generation.require_same_tokenizer", lambda *_: None)
    with pytest.raises(ConfigError, match=r"objective\.control reads the images"):
        own.check_codes(CodeInfo.__new__(CodeInfo))


@pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra lora")
def test_lora_adapts_the_generator_and_what_is_new_is_trained_in_full(plain: Path, tmp_path: Path) -> None:
    """The control encoder's blocks have the names of VAR's, and no adapter."""
    own = objective(plain, lora={"rank": 2})
    trained = {n for n, p in own.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n} == {n for n in own.model.state_dict() if n.startswith("controller.")}
    assert not any("lora" in n for n in own.model.state_dict() if n.startswith("controller."))
    loss(own, batch()).backward()
    own.export(tmp_path)
    assert AutoPipeline.from_pretrained(tmp_path).transformer.takes == {"class", "control"}
