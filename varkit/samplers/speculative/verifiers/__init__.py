"""Who decides which draft is kept: verifiers by name. `docs/sampling.md` compares them."""

from __future__ import annotations

import inspect
from typing import Any

from varkit.config import nearest
from varkit.samplers.speculative.interfaces import Verifier
from varkit.samplers.speculative.verifiers.bounded import Bounded
from varkit.samplers.speculative.verifiers.codes import OverCodes, nearest_codes
from varkit.samplers.speculative.verifiers.exact import Exact, Match
from varkit.samplers.speculative.verifiers.k_seq import KSeq
from varkit.samplers.speculative.verifiers.lantern import Lantern
from varkit.samplers.speculative.verifiers.lossy import Greedy, Grouped, Judge, JudgeHead, Threshold, train_judge

VERIFIERS: dict[str, type[Verifier]] = {
    "exact": Exact,
    "match": Match,
    "k-seq": KSeq,
    "bounded": Bounded,
    "lantern": Lantern,
    "grouped": Grouped,
    "judge": Judge,
    "threshold": Threshold,
    "greedy": Greedy,
}


def build_verifier(name: str, **options: Any) -> Verifier:
    """Raises: ValueError for a name or an option that there is none of, or a value that is not allowed."""
    if name not in VERIFIERS:
        raise ValueError(f"no verifier is called {name!r}{nearest(name, VERIFIERS)}; there are {', '.join(VERIFIERS)}")
    known = _options(VERIFIERS[name])
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the verifier {name} has no option {option!r}{nearest(option, known)}; {has}")
    return VERIFIERS[name](**options)


def verifier_options(verifier: Verifier) -> dict[str, Any]:
    """The options that build it again, for a configuration; codebooks and heads in memory are not among them."""
    return {name: getattr(verifier, name) for name in _options(type(verifier))}


def _options(cls: type[Verifier]) -> list[str]:
    return list(inspect.signature(cls).parameters) if "__init__" in cls.__dict__ else []


__all__ = [
    "VERIFIERS",
    "Bounded",
    "Exact",
    "Greedy",
    "Grouped",
    "Judge",
    "JudgeHead",
    "KSeq",
    "Lantern",
    "Match",
    "OverCodes",
    "Threshold",
    "build_verifier",
    "nearest_codes",
    "train_judge",
    "verifier_options",
]
