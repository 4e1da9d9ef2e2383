"""Samplers as one word of the command line: `sjd`, `eagle:network=DIR+lantern:k=100`, `auto`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from typing import Any

from varkit.config import nearest
from varkit.interfaces import Generator
from varkit.samplers.continuous import ContinuousSampler
from varkit.samplers.continuous_speculative import ContinuousSpeculativeSampler
from varkit.samplers.next_group import NextGroupSampler
from varkit.samplers.speculative.drafters import DRAFTERS
from varkit.samplers.speculative.sampler import SpeculativeSampler, made, options_of
from varkit.samplers.speculative.target import can_draft, check_target
from varkit.samplers.speculative.verifiers import VERIFIERS
from varkit.samplers.zipar import ZipARSampler

NAMES: dict[str, tuple[str, str]] = {
    "sjd": ("jacobi", "exact"),
    "gsd": ("jacobi", "grouped"),
    "lantern": ("eagle", "lantern"),
}
"""Pairs of drafter and verifier that have a name of their own."""

DRAFTED = ("cspd", "little")
"""Samplers that ask a smaller model, their option `model`."""

AUTO_IMAGES, AUTO_IMAGES_ELSEWHERE = {"cpu": 2}, 16
"""Up to how many images at once `auto` speculates, by device, and on others: a pass over a window of 8 costs about as
much as one over a single token while reading the weights is what takes time."""


def parse_options(text: str) -> dict[str, Any]:
    """`window=8,branches=[4,2]` as a dictionary; a value that is no JSON is a word. Raises ValueError."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found: dict[str, Any] = {}
    for part in parts if text else []:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"options of a sampler are key=value, separated by commas; got {part!r}")
        if key in found:
            raise ValueError(f"the option {key} is given twice")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def parse_pair(name: str) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """A drafter and a verifier, and the options of each.

    Args:
        name: DRAFTER, or DRAFTER+VERIFIER, or a pair of `NAMES`; options stand behind each name (`a:x=1+b:y=2`), or
            behind both (`a+b:x=1,y=2`) where one of them alone has such an option.
    Raises: ValueError on no such drafter, a text that is none, or an option that either could be meant by.
    """
    base, _, rest = name.partition(":")
    first, plus, second = base.partition("+")
    last = None if plus else re.search(r"\+([a-z][a-z-]*)(?::|$)", rest)
    drafter, verifier = NAMES.get(base, (first, second or "exact"))
    if drafter not in DRAFTERS or (last is not None and first not in DRAFTERS):
        known = ["auto", "plain", *NAMES, *DRAFTERS]
        raise ValueError(
            f"no sampler is called {name!r}{nearest(base, known)}; there are {', '.join(known)}, and DRAFTER+VERIFIER"
        )
    if last is not None:
        return first, last[1], parse_options(rest[: last.start()]), parse_options(rest[last.end() :])
    given, of_drafter = parse_options(rest), options_of(DRAFTERS[drafter])
    of_verifier = options_of(VERIFIERS[verifier]) if verifier in VERIFIERS and (plus or base in NAMES) else {}
    if both := [key for key in given if key in of_drafter and key in of_verifier]:
        key = both[0]
        raise ValueError(
            f"{drafter} and {verifier} both have an option {key}: write options behind the one that is meant, "
            f"such as {drafter}:{key}={given[key]}+{verifier}"
        )
    mine = {k: v for k, v in given.items() if k not in of_verifier}
    return drafter, verifier, mine, {k: v for k, v in given.items() if k in of_verifier}


def _of_class(name: str, kind: Any, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """A sampler with settings that others have too, and options of its own. Raises ValueError on an unknown one."""
    return made("sampler", {name: kind}, name, {**settings, **options}, {})


def _continuous(sampler: ContinuousSampler) -> dict[str, Any]:
    """The settings that every sampler of latents has."""
    names = inspect.signature(ContinuousSampler.__init__).parameters
    return {name: value for name, value in sampler.config.items() if name in names}


def with_draft(samplers: Sequence[str], draft: str | None) -> list[str]:
    """Names of samplers, those that ask a smaller model with `draft` as it.

    Raises: ValueError where none asks one.
    """
    if draft is None:
        return list(samplers)
    asking = [name.partition(":")[0].partition("+")[0] in DRAFTED for name in samplers]
    if not any(asking):
        raise ValueError(
            f"a draft model is asked by the samplers {' and '.join(DRAFTED)} (of MAR; of models of one token a step), "
            f"such as --sampler {DRAFTED[0]}; got {', '.join(samplers) or 'none'}"
        )
    pairs = zip(samplers, asking, strict=True)
    return [f"{name}{',' if ':' in name else ':'}model={draft}" if asks else name for name, asks in pairs]


def named_sampler(name: str, own: Any, transformer: Generator, batch: int) -> Any:
    """The sampler that a name stands for, with the settings of a pipeline's own sampler.

    Args:
        name: `plain`; `auto`, see below; what `parse_pair` reads; or others that take fewer passes: `zipar:window=4`,
            rows of a grid side by side, and `cspd:model=NAME`, of MAR.
        own: the pipeline's sampler.   batch: images that are drawn at once.

    `auto` is speculative Jacobi decoding, which needs no other network and keeps the law of plain decoding, where the
    model decides one token a step and few images are drawn at once (`AUTO_IMAGES`); else it is `plain`. Drafts of a
    position start as copies of the token above it where tokens form a grid, which was accepted most in our runs.
    Raises: ValueError on a bad name or option, or where the model has nothing to draft.
    """
    base, _, rest = name.partition(":")
    plain = own
    if isinstance(own, SpeculativeSampler | ZipARSampler):
        plain = NextGroupSampler(**NextGroupSampler.settings(own))
    if isinstance(own, ContinuousSpeculativeSampler):
        plain = ContinuousSampler(**_continuous(own))
    if base in ("plain", "auto"):
        if rest:
            raise ValueError(f"{base} has no options; got {rest!r}")
        if base == "plain" or not isinstance(plain, NextGroupSampler) or not can_draft(transformer):
            return plain
        least = AUTO_IMAGES.get(transformer.schedule()[0].device.type, AUTO_IMAGES_ELSEWHERE)
        if batch > least or plain.config.more_smooth:
            return plain
        flat = len(transformer.layout.grids[-1]) == 1
        options: dict[str, Any] = {"window": 8, "start": "random" if flat else "repeat-above"}
        return SpeculativeSampler(drafter_options=options, **NextGroupSampler.settings(plain))
    if base == "zipar":
        ZipARSampler.check(transformer)
        zipped: ZipARSampler = _of_class("zipar", ZipARSampler, NextGroupSampler.settings(plain), parse_options(rest))
        zipped.steps(transformer)
        return zipped
    if base == "cspd":
        ContinuousSpeculativeSampler.check_target(transformer)
        return _of_class("cspd", ContinuousSpeculativeSampler, _continuous(plain), parse_options(rest))
    drafter, verifier, of_drafter, of_verifier = parse_pair(name)
    check_target(transformer)
    return SpeculativeSampler(drafter, verifier, of_drafter, of_verifier, **NextGroupSampler.settings(plain))
