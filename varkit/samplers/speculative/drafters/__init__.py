"""Drafters by name."""

from __future__ import annotations

from varkit.samplers.speculative.drafters.jacobi import Jacobi
from varkit.samplers.speculative.interfaces import Drafter

DRAFTERS: dict[str, type[Drafter]] = {"jacobi": Jacobi}
