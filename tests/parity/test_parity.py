"""Every fixture of a folder through the adapters; `pytest tests/parity --fixtures DIR` runs another folder."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.adapters import ADAPTERS
from tests.parity.weights import Case, Fixture, load_fixture

for _file in sorted(Path(__file__).parent.glob("adapters_*.py")):
    import_module(f"tests.parity.{_file.stem}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" not in metafunc.fixturenames:
        return
    folder: Path = metafunc.config.getoption("--fixtures")
    found = [(p, n) for p in sorted(folder.glob("*.json")) for n in json.loads(p.read_text())["cases"]]
    metafunc.parametrize(("path", "case_name"), found, ids=[f"{p.stem}-{n}" for p, n in found])


@cache
def opened(path: Path) -> Fixture:
    return load_fixture(path)


def traces(inputs: dict[str, Tensor], ddof: int) -> float:
    """tr(S1) + tr(S2): the sums of the variances of the feature sets (N, D) of a case."""
    return sum(float(features.double().var(0, correction=ddof).sum()) for features in inputs.values())


def check(
    name: str, ours: Tensor, recorded: Tensor, meta: dict[str, Any], inputs: dict[str, Tensor] | None = None
) -> None:
    """The comparison rules of the fixture format; some scale with what the case gives."""
    scale = meta.get("tolerance_scale")
    assert scale in (None, "traces"), f"unknown tolerance_scale {scale!r}"
    assert ours.shape == recorded.shape, f"{name}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
    tolerance = meta.get("tolerance", 0)
    named = isinstance(tolerance, dict) and name in tolerance
    if isinstance(tolerance, dict):
        tolerance = tolerance.get(name, 0)
    if not recorded.is_floating_point() and not named:
        assert torch.equal(ours.to(recorded.dtype), recorded), f"{name}: {int((ours != recorded).sum())} differ"
        return
    if not recorded.numel():
        return  # of equal shape
    a, b = ours.detach().double(), recorded.double()
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
    same = (a == b) | a.isnan()  # equal infinities match
    difference = torch.where(same, 0.0, (a - b).abs())
    allowed = tolerance * max(1.0, float(b.abs().max())) if meta.get("relative") else tolerance
    if scale == "traces":
        allowed = tolerance * traces(inputs or {}, meta["settings"]["ddof"])
    assert float(difference.max()) <= allowed, f"{name}: off by {float(difference.max()):.3g}, allowed {allowed:.3g}"


def test_case(path: Path, case_name: str) -> None:
    case = Case(opened(path), case_name)
    meta = case.meta
    key = (case.fixture.meta["system"], meta["component"], meta["op"])
    if meta.get("optional"):
        pytest.skip("depends on torch.multinomial's own stream; varkit draws by inverse CDF from keyed numbers")
    assert key in ADAPTERS, f"no adapter knows {key}"
    if meta.get("expect") == "error":
        with pytest.raises((ValueError, TypeError)):
            ADAPTERS[key](case)
        return
    answers = ADAPTERS[key](case)
    if "expected" in meta:  # answers that are no tensors
        assert answers == meta["expected"]
        return
    recorded = case.outputs
    assert recorded, f"{path.name}: case {case_name} records no output"
    assert recorded.keys() <= answers.keys(), f"not answered: {sorted(recorded.keys() - answers.keys())}"
    for name, tensor in recorded.items():
        check(name, answers[name], tensor, meta, case.inputs)


def test_an_unknown_operation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixture that no adapter knows must fail, never pass in silence."""
    meta = {"system": "var", "cases": {"x": {"component": "sampler", "op": "levitate"}}}
    monkeypatch.setitem(globals(), "opened", lambda path: Fixture(meta, {}, {}))
    with pytest.raises(AssertionError, match="no adapter knows"):
        test_case(Path("x.json"), "x")


@pytest.mark.parametrize("fault", [0.01, float("nan")])
def test_the_comparison_sees_a_wrong_number(fault: float) -> None:
    with pytest.raises(AssertionError):
        check("x", torch.tensor([1.0 + fault]), torch.tensor([1.0]), {"tolerance": 1e-4})
    with pytest.raises(AssertionError):
        check("ids", torch.tensor([1]), torch.tensor([2]), {"tolerance": 10.0})


def test_a_tolerance_in_traces_is_that_and_no_more() -> None:
    """tr(S1) + tr(S2) = 2 + 8 with N - 1, so 1e-3 of it is 0.01."""
    inputs = {
        "features_1": torch.tensor([[0.0, 0.0], [0.0, 2.0]]),
        "features_2": torch.tensor([[0.0, 4.0], [0.0, 0.0]]),
    }
    meta = {"tolerance": 1e-3, "tolerance_scale": "traces", "settings": {"ddof": 1}}
    recorded = torch.tensor([5.0], dtype=torch.float64)
    check("value", recorded + 0.0099, recorded, meta, inputs)
    with pytest.raises(AssertionError, match="off by"):
        check("value", recorded + 0.0101, recorded, meta, inputs)
    with pytest.raises(AssertionError, match="off by"):  # by N the traces are half as large
        check("value", recorded + 0.0099, recorded, {**meta, "settings": {"ddof": 0}}, inputs)
    with pytest.raises(AssertionError, match="unknown tolerance_scale"):
        check("value", recorded, recorded, {**meta, "tolerance_scale": "luck"}, inputs)
