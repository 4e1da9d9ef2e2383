"""Drafters by name."""

from __future__ import annotations

from varkit.samplers.speculative.drafters.copies import Neighbour
from varkit.samplers.speculative.drafters.eagle import EagleDrafter
from varkit.samplers.speculative.drafters.jacobi import Jacobi
from varkit.samplers.speculative.drafters.models import Early, Little
from varkit.samplers.speculative.drafters.recycling import NGram, Recycling
from varkit.samplers.speculative.interfaces import Drafter

DRAFTERS: dict[str, type[Drafter]] = {
    "jacobi": Jacobi,
    "recycling": Recycling,
    "n-gram": NGram,
    "little": Little,
    "self": Early,
    "neighbour": Neighbour,
    "eagle": EagleDrafter,
}
