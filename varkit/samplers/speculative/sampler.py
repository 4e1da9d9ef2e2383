"""Speculative decoding as a sampler of a pipeline: drafter and verifier by name, settings as of plain decoding."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.config import nearest
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Rng
from varkit.samplers.guidance import guidance_interval, guidance_schedule
from varkit.samplers.next_group import Known, NextGroupSampler, SamplerOutput, StepInfo
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters import DRAFTERS
from varkit.samplers.speculative.engine import check_pair, decode
from varkit.samplers.speculative.interfaces import Drafter, Verifier
from varkit.samplers.speculative.target import Target, can_draft, check_target
from varkit.samplers.speculative.verifiers import VERIFIERS, Grouped, OverCodes

NAMES: dict[str, tuple[str, str]] = {
    "sjd": ("jacobi", "exact"),
    "gsd": ("jacobi", "grouped"),
    "lantern": ("eagle", "lantern"),
}
"""Pairs of drafter and verifier that have a name of their own."""


AUTO_IMAGES, AUTO_IMAGES_ELSEWHERE = {"cpu": 2}, 16
"""Up to how many images at once `auto` speculates, by device, and on others: a pass over a window of 8 costs about as
much as one over a single token while reading the weights is what takes time."""


@dataclass
class SpeculativeOutput(SamplerOutput):
    """As of any sampler; lists have one number an image.

    target_calls: passes of the target that the image took part in.   drafted: nodes.   accepted: of them.
    tokens_per_call: emitted tokens by target calls.   lossless: whether images follow the law of plain decoding.
    """

    target_calls: list[int]
    drafted: list[int]
    accepted: list[int]
    tokens_per_call: list[float]
    lossless: bool


def _made(kind: str, table: dict[str, Any], name: str, options: dict[str, Any], more: dict[str, Any]) -> Any:
    """An object of `table` by name. Raises ValueError on an unknown name or option."""
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}{nearest(name, table)}; there are {', '.join(table)}")
    taken = set(inspect.signature(table[name].__init__).parameters) - {"self"}
    if unknown := sorted(options.keys() - taken):
        raise ValueError(
            f"{kind} {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(taken)) or 'none'}"
        )
    return table[name](**options, **{k: v for k, v in more.items() if k in taken and k not in options})


class SpeculativeSampler(NextGroupSampler, SchedulerMixin):  # named here too: diffusers looks for it in this module
    """Draft several tokens, look at all in one pass of the model, keep what the verifier accepts.

    Args:
        drafter, drafter_options: a name of `DRAFTERS`, and arguments of its class.
        verifier, verifier_options: a name of `VERIFIERS`, likewise.
        others: see `NextGroupSampler`; `more_smooth` and `num_steps` are refused.
    Attributes:
        draft_model: a generator, for drafters that ask one. It is not saved; the option `model` of the drafter, a name
            or folder, is, and a pipeline opens it.
    """

    draft_model: Generator | None = None
    _ready: tuple[Tokenizer, Verifier] | None = None

    @register_to_config
    def __init__(
        self,
        drafter: str = "jacobi",
        verifier: str = "exact",
        drafter_options: dict[str, Any] | None = None,
        verifier_options: dict[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        guidance_interval: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        more_smooth: bool = False,
        num_tokens: int | None = None,
        guidance_power: float = 1.0,
        num_steps: int | None = None,
        order: str | None = None,
    ) -> None:
        self.settings(**dict(self.config))
        check_pair(self.new_drafter(), self.new_verifier())

    @property
    def lossless(self) -> bool:
        """Whether images follow the law of plain decoding. Processors look at single positions: the verifier says."""
        return self.new_verifier().lossless

    def new_drafter(self) -> Drafter:
        """A drafter for one batch. Raises ValueError on a bad name or option."""
        options = dict(self.config.drafter_options or {})
        if isinstance(options.get("model"), str):
            del options["model"]
        return _made("drafter", DRAFTERS, self.config.drafter, options, {"model": self.draft_model})

    @property
    def model_to_open(self) -> str | None:
        """The name of the drafting model that the options give, while `draft_model` is not set."""
        return (self.config.drafter_options or {}).get("model") if self.draft_model is None else None

    def new_verifier(self) -> Verifier:
        """Raises ValueError on a bad name or option."""
        return _made("verifier", VERIFIERS, self.config.verifier, dict(self.config.verifier_options or {}), {})

    def verifier_for(self, tokenizer: Tokenizer) -> Verifier:
        """The verifier, with the codebook where it compares codes; made once, for neighbours take some time to find."""
        if self._ready is None or self._ready[0] is not tokenizer:
            verifier = self.new_verifier()
            if isinstance(verifier, OverCodes | Grouped):
                verifier.use_codebook(tokenizer.codebook)
            self._ready = tokenizer, verifier
        return self._ready[1]

    def settings(self, **changes: Any) -> dict[str, Any]:
        merged = super().settings(**changes)
        if merged["more_smooth"]:
            raise ValueError(
                "more_smooth hands on mixtures of codes, which no draft can be compared with: leave it off"
            )
        return merged

    def target(
        self, transformer: Generator, cond: Cond, null: Cond | None, settings: dict[str, Any], groups: list[Tensor]
    ) -> Target:
        """What is decoded, under these settings."""
        check_target(transformer)
        w = float(settings["guidance_scale"])
        if w != 1 and null is None:
            raise ValueError(f"guidance_scale {w:g} needs the unconditional branch (null=)")
        schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
        first, last = guidance_interval(settings["guidance_interval"]) or (0, len(groups))
        scales = [schedule(w, t, len(groups) - 1) if first <= t <= last else 1.0 for t in range(len(groups))]
        return Target(
            transformer,
            cond,
            null if w != 1 else None,
            torch.cat(groups),
            torch.tensor(scales, device=groups[0].device),
            build_processors(**{k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")}),
        )

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        transformer: Generator,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        draw: Callable[[Any, Tensor], Tensor] | None = None,
        **changes: Any,
    ) -> SpeculativeOutput:
        """As `NextGroupSampler.generate`. `on_step` is called after each pass with the tokens that every image has.

        Raises: ValueError on a bad setting, a model that does not decide one token a step, or parts that do not go
            together, before any work.
        """
        settings = self.settings(**changes)
        if draw is not None:
            raise ValueError("speculative decoding draws by its verifier: draw= goes with NextGroupSampler")
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        check_target(transformer)
        before, groups = self.groups_around(transformer, known, rng, **settings)
        groups = [*before.split(1), *groups] if before.numel() else groups
        drafter, verifier = self.new_drafter(), self.verifier_for(tokenizer)
        began = time.perf_counter()
        target = self.target(transformer, cond, null, settings, groups)
        order = target.order
        given = None
        if known is not None:
            tokens, keep = known
            given = tokens[:, order], keep.expand(len(cond), -1)[:, order]
        seen = {"step": 0, "count": 0}

        def on_round(count: int, tokens: Tensor) -> None:
            new, step = order[seen["count"] : count], seen["step"]
            seen.update(step=step + 1, count=count)
            if on_step is not None:
                decided = tokens[:, :count]
                on_step(StepInfo(step, len(groups), new, decided[:, count - len(new) :], decided, torch.empty(0)))

        counts = decode(target, drafter, verifier, rng, given, on_round)
        return SpeculativeOutput(
            tokens=counts.tokens[:, order.argsort()],
            steps=counts.passes,
            network_calls=counts.passes,
            seconds=time.perf_counter() - began,
            target_calls=counts.target_calls,
            drafted=counts.drafted,
            accepted=counts.accepted,
            tokens_per_call=[len(groups) / calls for calls in counts.target_calls],
            lossless=verifier.lossless,
        )


def _options(text: str) -> dict[str, Any]:
    """`window=8,branches=[4,2]` as a dictionary; a value that is no JSON is a word."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text) if text else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"options of a sampler are key=value, separated by commas; got {part!r}")
        try:
            found[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[key.strip()] = value
    return found


def named_sampler(name: str, own: Any, transformer: Generator, batch: int) -> Any:
    """The sampler that a name stands for, with the settings of a pipeline's own sampler.

    Args:
        name: `plain`; `auto`, see below; `sjd`, a drafter (verified exactly), or DRAFTER+VERIFIER, each with options of
            either behind a colon: `sjd:window=8,start=repeat-above`, `little:model=NAME`.
        own: the pipeline's sampler.   batch: images that are drawn at once.

    `auto` is speculative Jacobi decoding, which needs no other network and keeps the law of plain decoding, where the
    model decides one token a step and few images are drawn at once (`AUTO_IMAGES`); else it is `plain`. Drafts of a
    position start as copies of the token above it where tokens form a grid, which was accepted most in our runs.
    Raises: ValueError on a bad name or option, or where the model has nothing to draft.
    """
    base, _, rest = name.partition(":")
    plain = own
    if isinstance(own, SpeculativeSampler):
        plain = NextGroupSampler(**NextGroupSampler.settings(own))
    if base in ("plain", "auto"):
        if rest:
            raise ValueError(f"{base} has no options; got {rest!r}")
        least = AUTO_IMAGES.get(transformer.schedule()[0].device.type, AUTO_IMAGES_ELSEWHERE)
        if base == "plain" or not can_draft(transformer) or not isinstance(plain, NextGroupSampler) or batch > least:
            return plain
        if plain.config.more_smooth:
            return plain
        flat = len(transformer.layout.grids[-1]) == 1
        options: dict[str, Any] = {"window": 8, "start": "random" if flat else "repeat-above"}
        return SpeculativeSampler(drafter_options=options, **NextGroupSampler.settings(plain))
    drafter, plus, verifier = base.partition("+")
    if not plus:
        drafter, verifier = NAMES.get(base, (base, "exact"))
    known = ["auto", "plain", *NAMES, *DRAFTERS]
    if drafter not in DRAFTERS:
        raise ValueError(
            f"no sampler is called {name!r}{nearest(base, known)}; there are {', '.join(known)}, and DRAFTER+VERIFIER"
        )
    check_target(transformer)
    given = _options(rest)
    of_verifier = set(inspect.signature(VERIFIERS[verifier].__init__).parameters) if verifier in VERIFIERS else set()
    of_drafter = set(inspect.signature(DRAFTERS[drafter].__init__).parameters)
    return SpeculativeSampler(
        drafter,
        verifier,
        {k: v for k, v in given.items() if k in of_drafter or k not in of_verifier},
        {k: v for k, v in given.items() if k in of_verifier and k not in of_drafter},
        **NextGroupSampler.settings(plain),
    )
