"""Options and paths for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

# A plug-in as a user would install it: a module and its entry point, beside each other on the path.
sys.path.insert(0, str(HERE / "toy_paper"))


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest spells "list the fixture functions" --fixtures too; here, and only here, the word means the
    # recorded answers of the official code. `--funcargs` still lists the functions.
    builtin = parser.optparser._option_string_actions.get("--fixtures")
    if builtin is not None:
        builtin.container._handle_conflict_resolve(builtin, [("--fixtures", builtin)])  # type: ignore[attr-defined]
    parser.addoption(
        "--fixtures",
        type=Path,
        default=HERE / "parity" / "fixtures",
        help="folder of parity fixtures (NAME.json + NAME.safetensors) for tests/parity",
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
