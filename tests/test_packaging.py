"""What is installed, and what an import costs. The folder tokenizers/ must never shadow the package tokenizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import varkit

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizers", "train", "sample", "eval")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_folders_are_no_packages(stage: str) -> None:
    assert not list((ROOT / stage).rglob("__init__.py"))


def test_script_names_shadow_no_module() -> None:
    """`python train/x.py` puts train/ first on the path, so a file there hides an installed module of its name."""
    names = [p.stem for stage in STAGES for p in (ROOT / stage).glob("*.py")]
    assert len(set(names)) == len(names)
    taken = {*sys.stdlib_module_names, *varkit.__all__, "varkit", "torch", "torchvision", "datasets", "accelerate"}
    taken |= {"diffusers", "transformers", "tokenizers", "timm", "scipy", "numpy", "PIL", "evaluate", "gradio", "yaml"}
    assert set(names) & (taken - {"evaluate"}) == set()  # eval/evaluate.py: nothing here imports that package


# ---- the wheel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], set[str]]:
    """Files of a wheel built from a copy of the checkout, and files of varkit/ in that copy."""
    pytest.importorskip("setuptools", minversion="70.1", reason="older ones need the package wheel as well")
    tmp = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "runs", "out", "fixtures", ".*")
    shutil.copytree(ROOT, tmp / "src", ignore=skip)
    (tmp / "src" / "varkit" / "layers" / "__pycache__").mkdir()
    (tmp / "src" / "varkit" / "layers" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"old")
    tree = {
        p.relative_to(tmp / "src").as_posix()
        for p in (tmp / "src" / "varkit").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp / "out")], cwd=tmp / "src", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp / "out").glob("*.whl"))) as archive:
        return archive.namelist(), tree


def test_wheel_holds_varkit_and_nothing_else(wheel: tuple[list[str], set[str]]) -> None:
    names, _ = wheel
    assert {name.split("/")[0] for name in names} == {"varkit", f"varkit-{varkit.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".orig", ".part"))]


def test_wheel_holds_all_of_varkit(wheel: tuple[list[str], set[str]]) -> None:
    """Of the zoo only fashion-var and the network moving-fashion are installed; later models are files of the
    repository."""
    names, tree = wheel
    packed = {name for name in names if name.startswith("varkit/")}
    zoo = {f for f in tree if f.startswith("varkit/zoo/") and f.count("/") > 2 and "/fashion-var/" not in f}
    assert tree - zoo - packed == set()
    assert packed - tree == set()
    assert {f for f in tree if f.startswith("varkit/zoo/moving-fashion/")} <= packed
    assert {"varkit/py.typed", "varkit/recipes/fashion_var.yaml", "varkit/training/objectives/__init__.py"} <= packed


def test_wheel_has_the_command(wheel: tuple[list[str], set[str]]) -> None:
    assert f"varkit-{varkit.__version__}.dist-info/entry_points.txt" in wheel[0]


# ---- a fresh interpreter in the repository root -----------------------------------------------------------------

PROBE = """
import json, sys
before = set(sys.modules)
import varkit
report = {"modules": sorted(set(sys.modules) - before), "path": sys.path[0], "dir": dir(varkit)}
varkit.__version__
report["after"] = sorted(set(sys.modules) - before)
import tokenizers
import transformers
report["tokenizers"] = tokenizers.__file__
report["encoding"] = tokenizers.Encoding.__name__
report["transformers"] = isinstance(transformers.PreTrainedTokenizerFast, type)
print(json.dumps(report))
"""


@pytest.fixture(scope="module", name="fresh")
def _fresh() -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_varkit_imports_nothing_heavy(fresh: dict[str, Any]) -> None:
    assert fresh["path"] in ("", str(ROOT))
    for modules in (fresh["modules"], fresh["after"]):
        assert {m for m in modules if m.split(".")[0] == "varkit"} == {"varkit"}
        foreign = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) - {"varkit"}
        assert not foreign
    assert set(fresh["dir"]) == set(varkit.__all__)


def test_tokenizers_is_the_installed_package(fresh: dict[str, Any]) -> None:
    assert fresh["tokenizers"] is not None, "tokenizers is a folder without __init__.py: ours, or not installed"
    assert not Path(fresh["tokenizers"]).is_relative_to(ROOT / "tokenizers")
    assert fresh["encoding"] == "Encoding" and fresh["transformers"] is True


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", varkit.__all__)
def test_names_resolve(name: str) -> None:
    value = getattr(varkit, name)
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"module 'varkit' has no attribute 'nope'; it has .*ClassToImagePipeline"):
        varkit.nope  # noqa: B018
