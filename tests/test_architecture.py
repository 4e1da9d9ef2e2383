"""The shape of the package, read from its source: who may import whom, and what no file may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "varkit"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
TREES = {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in FILES}

GROUND = {
    "config",
    "rng",
    "layout",
    "orders",
    "entities",
    "compiler",
    "interfaces",
    "registry",
    "pictures",
    "eight_bit",
    "hub",
    "model_card",
    "metrics.report",
    "metrics.classifier",
    "metrics.weights",
}
"""Modules all may import. A card needs a report, which is plain data, and every model can be pushed with its card. A
classifier is a network that knows nothing of metrics, and where weights lie is no matter of metrics alone."""

PARTS = GROUND | {"layers", "heads.flow", "samplers.ode", "samplers.branches"}
MODELS = PARTS | {"tokenizers", "heads", "conditioning", "generators", "samplers"}
FILES_AROUND = MODELS | {"checkpoints", "data", "pipelines", "metrics"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "rng": set(),
    "layout": set(),
    "orders": {"config", "rng"},
    "entities": {"layout"},
    "compiler": {"config"},
    "interfaces": {"config", "layout", "rng"},
    "registry": {"config"},
    "pictures": set(),
    "metrics.report": set(),
    "metrics.classifier": set(),
    "metrics.weights": set(),
    "model_card": {"metrics.report"},
    "eight_bit": set(),
    "hub": {"metrics.report", "model_card", "eight_bit"},
    "samplers.ode": set(),  # plain functions of tensors: flow decoders of tokenizers integrate too
    "samplers.branches": {"samplers.ode"},
    "heads.flow": {"interfaces", "rng", "samplers.ode", "samplers.branches"},
    "layers": GROUND,
    "tokenizers": PARTS,
    "heads": PARTS,
    "conditioning": PARTS,
    "generators": PARTS | {"tokenizers", "heads", "conditioning"},
    "samplers": MODELS - {"samplers"},
    "data": GROUND,
    "checkpoints": MODELS,
    "pipelines": MODELS | {"checkpoints", "data"},
    "metrics": MODELS | {"checkpoints", "data", "pipelines", ""},
    "training": MODELS | {"checkpoints", "data", "pipelines", "metrics"},
    "checkpoints.convert": MODELS | {"checkpoints", "pipelines"},  # writes pipeline folders
    "catalog": FILES_AROUND | {"training"},
    "demo": FILES_AROUND | {"training", "catalog", ""},
    "commands": FILES_AROUND | {"training", "checkpoints.convert", "catalog"},
    "cli": {"commands", "demo", ""},
    "__main__": {"cli", ""},
}
"""Group of files -> groups it may import, besides itself; `` is the package, `import varkit`."""


TALKING = ("cli", "commands", "demo", "__main__")
"""Those that speak to a person: nothing else imports them."""


def group(name: str) -> str:
    """`varkit.generators.var` and `varkit/generators/var.py` -> `generators`; the package itself -> ``."""
    parts = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".").split(".")[1:]
    return next((g for g in (".".join(parts[:2]), *parts[:1]) if g in MAY_IMPORT), "".join(parts[:1]))


def imports(tree: ast.AST, file: str) -> Iterator[tuple[str, int]]:
    """Names of varkit modules imported anywhere in a file, also inside functions, with their lines."""
    package = file.removesuffix("/__init__.py").removesuffix(".py").split("/")
    package = package if file.endswith("__init__.py") else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            found = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        else:
            continue
        for name in found:
            if name.split(".")[0] == "varkit" and not name.startswith("varkit.__version__"):
                yield name, node.lineno


def called(node: ast.Call) -> str:
    """`torch.load` for torch.load(...), `print` for print(...), `.cuda` for anything else's .cuda(...)."""
    function, names = node.func, []
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    return ".".join([function.id if isinstance(function, ast.Name) else "", *reversed(names)])


def upward(tree: ast.AST, file: str) -> list[str]:
    """Imports of a file that point up."""
    mine = group(file)
    allowed = MAY_IMPORT[mine] | {mine}
    return [f"{file}:{line} imports {name}" for name, line in imports(tree, file) if group(name) not in allowed]


def keyword(node: ast.Call, name: str) -> object:
    return next((k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def to_stderr(node: ast.Call) -> bool:
    """Standard output belongs to the commands; a count on standard error does no harm."""
    return any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in node.keywords)


def forbidden(tree: ast.AST, file: str) -> list[str]:
    """Calls that no file of the package may make."""
    talks = group(file) in TALKING
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module, node.level) in {
            ("torch", 0),
            ("pickle", 0),
            ("numpy", 0),
        }:
            bad = {"load", "loads", "Unpickler"} & {alias.name for alias in node.names}
            found += [f"{file}:{node.lineno} from {node.module} import {name}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        wrong = (
            name.endswith(".cuda")
            or (name == "print" and not talks and not to_stderr(node))
            or name in ("exec", "eval", "builtins.exec", "builtins.eval")
            or name in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            or (name == "torch.load" and keyword(node, "weights_only") is not True)
            or (name.endswith("load_state_dict_from_url") and keyword(node, "weights_only") is not True)
            or keyword(node, "allow_pickle") is True
        )
        if wrong:
            found.append(f"{file}:{node.lineno} {name}(")
    return found


# ---- the package ------------------------------------------------------------------------------------------------


def test_there_is_something_to_read() -> None:
    assert {"varkit/rng.py", "varkit/generators/var.py", "varkit/training/objectives/next_scale.py"} <= TREES.keys()
    assert sum(1 for file, tree in TREES.items() for _ in imports(tree, file)) > 50


def test_every_module_has_its_place() -> None:
    unknown = {group(file) for file in TREES} - MAY_IMPORT.keys() - {""}
    assert not unknown, f"say in MAY_IMPORT what these may import: {sorted(unknown)}"


def test_the_arrows_have_no_circle() -> None:
    ranks: dict[str, int] = {}
    while len(ranks) < len(MAY_IMPORT):
        ready = [g for g, below in MAY_IMPORT.items() if g not in ranks and below - {g, ""} <= ranks.keys()]
        assert ready, f"a circle among {sorted(MAY_IMPORT.keys() - ranks.keys())}"
        ranks |= {g: len(ranks) for g in ready}
    assert not any(
        {"cli", "commands", "demo", "catalog"} & below for g, below in MAY_IMPORT.items() if g not in TALKING
    )


@pytest.mark.parametrize("file", [f for f in TREES if group(f)])
def test_imports_point_down(file: str) -> None:
    assert not upward(TREES[file], file)


@pytest.mark.parametrize("file", TREES)
def test_no_forbidden_calls(file: str) -> None:
    assert not forbidden(TREES[file], file)


def test_the_package_imports_nothing_of_its_own_at_run_time() -> None:
    body = TREES["varkit/__init__.py"].body
    always = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    assert not list(imports(ast.Module(always, []), "varkit/__init__.py"))


def test_names_for_type_checkers_are_those_of_the_table() -> None:
    body = TREES["varkit/__init__.py"].body
    checked = next(node for node in body if isinstance(node, ast.If)).body
    table = next(n for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_EXPORTS").value
    listed = {a.name: n.module for n in checked if isinstance(n, ast.ImportFrom) for a in n.names}
    assert listed == ast.literal_eval(table)


@pytest.mark.parametrize(
    "path",
    [ROOT / "app.py", *sorted(p for d in ("tokenizers", "train", "sample", "eval") for p in (ROOT / d).glob("*.py"))],
)
def test_what_people_launch_holds_no_logic(path: Path) -> None:
    """Launched files are a few lines around the package; they too load and run nothing unsafe."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert not [f for f in forbidden(ast.parse(text), "varkit/cli.py") if "print(" not in f]


# ---- the checks themselves can fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("varkit/layers/x.py", "from varkit.generators.var import VAR"),
        ("varkit/layers/x.py", "import varkit.tokenizers.multiscale_vq"),
        ("varkit/rng.py", "from varkit.layout import TokenLayout"),
        ("varkit/tokenizers/x.py", "def f():\n    from varkit.generators import var"),
        ("varkit/generators/x.py", "from varkit.samplers import next_group"),
        ("varkit/generators/x.py", "from ..pipelines.auto import AutoPipeline"),
        ("varkit/samplers/__init__.py", "from ..pipelines import auto"),
        ("varkit/samplers/x.py", "from varkit import pipelines"),
        ("varkit/samplers/x.py", "import importlib\nimportlib.import_module('varkit.pipelines.auto')"),
        ("varkit/pipelines/x.py", "from varkit.training.loop import train"),
        ("varkit/data/x.py", "from varkit.pipelines.auto import AutoPipeline"),
        ("varkit/training/x.py", "from varkit.cli import app"),
        ("varkit/training/x.py", "import varkit"),
        ("varkit/pipelines/x.py", "from varkit.checkpoints.convert import convert"),
        ("varkit/pipelines/x.py", "from varkit.checkpoints import convert"),
        ("varkit/checkpoints/x.py", "from varkit.pipelines.auto import AutoPipeline"),
        ("varkit/demo/x.py", "from varkit import cli"),
        ("varkit/metrics/x.py", "from varkit import create_model"),  # by its module, not by the lazy package
    ],
)
def test_upward_imports_are_seen(file: str, source: str) -> None:
    assert len(upward(ast.parse(source), file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("varkit/generators/x.py", "from ..heads.categorical import Categorical"),
        ("varkit/generators/x.py", "from .var import VAR"),
        ("varkit/cli.py", "from varkit.demo.app import main"),
        ("varkit/cli.py", "import varkit"),
        ("varkit/checkpoints/convert.py", "from varkit.pipelines.class_to_image import ClassToImagePipeline"),
        ("varkit/checkpoints/x.py", "from varkit.checkpoints import var as var_keys"),
        ("varkit/pipelines/x.py", "from varkit import registry, __version__"),
        ("varkit/layers/x.py", "import torch\nfrom diffusers.models import x"),
    ],
)
def test_downward_imports_pass(file: str, source: str) -> None:
    assert not upward(ast.parse(source), file)


@pytest.mark.parametrize(
    "source",
    [
        "model.cuda()",
        "f(x).y.cuda(0)",
        "print('x')",
        "print('x', file=handle)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "torch.hub.load_state_dict_from_url('x')",
        "pickle.load(f)",
        "pickle.loads(b)",
        "from torch import load",
        "from pickle import loads",
        "np.load('x', allow_pickle=True)",
        "exec('x')",
        "eval('x')",
    ],
)
def test_forbidden_calls_are_seen(source: str) -> None:
    assert len(forbidden(ast.parse(source), "varkit/generators/x.py")) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("varkit/cli.py", "print('x')"),
        ("varkit/demo/x.py", "print('x')"),
        ("varkit/x.py", "print('x', end='', file=sys.stderr)"),
        ("varkit/x.py", "model.eval()"),
        ("varkit/x.py", "torch.load('x', weights_only=True)"),
        ("varkit/x.py", "np.load('x', allow_pickle=False)"),
        ("varkit/x.py", "x.to('cuda')"),
    ],
)
def test_allowed_calls_pass(file: str, source: str) -> None:
    assert not forbidden(ast.parse(source), file)
