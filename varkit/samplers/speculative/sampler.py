"""Speculative decoding as a sampler of a pipeline: drafter and verifier by name, settings as of plain decoding."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.config import nearest
from varkit.generators.eagle import Eagle
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Rng
from varkit.samplers.next_group import Known, NextGroupSampler, SamplerOutput, StepInfo
from varkit.samplers.speculative.drafters import DRAFTERS
from varkit.samplers.speculative.engine import check_pair, decode
from varkit.samplers.speculative.interfaces import Drafter, Verifier
from varkit.samplers.speculative.target import Target, check_target, target_of
from varkit.samplers.speculative.verifiers import VERIFIERS, Grouped, OverCodes


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


OPENED = ("model", "network")
"""Options of drafters that name a network, which a pipeline opens."""


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def options_of(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a drafter's or a verifier's class by name."""
    return {} if cls.__init__ is object.__init__ else dict(inspect.signature(cls).parameters)


def _check_kind(what: str, parameter: inspect.Parameter, value: Any) -> None:
    """Raises ValueError where a plain argument has a value of another kind, as a text may."""
    kinds = set(str(parameter.annotation).split(" | ")) - {"None"}
    allowed = tuple(kind for name in kinds for kind in _KINDS.get(name, ()))
    if value is None or not kinds <= _KINDS.keys() or (isinstance(value, allowed) and type(value) is not bool):
        return
    if not (isinstance(value, bool) and "bool" in kinds):
        raise ValueError(f"{what} must be {' or '.join(sorted(kinds))}; got {value!r}")


def made(kind: str, table: dict[str, Any], name: str, options: dict[str, Any], more: dict[str, Any]) -> Any:
    """An object of `table` by name. Raises ValueError on an unknown name or option, or a value of another kind."""
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}{nearest(name, table)}; there are {', '.join(table)}")
    taken = options_of(table[name])
    if unknown := sorted(options.keys() - taken):
        raise ValueError(
            f"{kind} {name} has no option {', '.join(unknown)}{nearest(unknown[0], taken)}; "
            f"it has {', '.join(sorted(taken)) or 'none'}"
        )
    for option, value in options.items():
        _check_kind(f"{option} of the {kind} {name}", taken[option], value)
    try:
        return table[name](**options, **{k: v for k, v in more.items() if k in taken and k not in options})
    except TypeError as error:
        raise ValueError(f"the {kind} {name} cannot take {options}: {error}") from None


class SpeculativeSampler(NextGroupSampler, SchedulerMixin):  # named here too: diffusers looks for it in this module
    """Draft several tokens, look at all in one pass of the model, keep what the verifier accepts.

    Args:
        drafter, drafter_options: a name of `DRAFTERS`, and arguments of its class.
        verifier, verifier_options: a name of `VERIFIERS`, likewise.
        others: see `NextGroupSampler`; `more_smooth` and `num_steps` are refused.
    Attributes:
        draft_model: a generator, or an EAGLE network, for drafters that ask one. It is not saved; the option `model`
            or `network` of the drafter, a name or folder, is, and a pipeline opens it.
    """

    draft_model: Generator | Eagle | None = None
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
        given = self.config.drafter_options or {}
        options = {k: self.draft_model if k in OPENED and isinstance(v, str) else v for k, v in given.items()}
        return made("drafter", DRAFTERS, self.config.drafter, options, dict.fromkeys(OPENED, self.draft_model))

    @property
    def model_to_open(self) -> tuple[str, str] | None:
        """Which of `OPENED` the drafter's options give, and its name, while `draft_model` is not set."""
        given = self.config.drafter_options or {}
        named = [(k, given[k]) for k in OPENED if isinstance(given.get(k), str)]
        return named[0] if named and self.draft_model is None else None

    def new_verifier(self) -> Verifier:
        """Raises ValueError on a bad name or option."""
        return made("verifier", VERIFIERS, self.config.verifier, dict(self.config.verifier_options or {}), {})

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
        return target_of(transformer, cond, null, settings, groups)

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
