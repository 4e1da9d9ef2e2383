"""Running a network for a visitor: in turn, told step by step, and stopped when the visitor is gone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image


class Turns:
    """Who may run a network: one at a time, in the order of asking.

    A short request takes one turn. Long ones (an evaluation) take a turn for each batch, so that the others wait for a
    batch, not for the whole.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._last = self._serving = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        with self._condition:
            mine, self._last = self._last, self._last + 1
            while mine != self._serving:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._serving += 1
                self._condition.notify_all()


@dataclass
class Step:
    """One step of a run: `image` is the first image so far, where the tokenizer can show it; `caption` says how far."""

    number: int
    total: int
    image: Image.Image | None
    caption: str = ""


@dataclass
class Done:
    """The end of a run: what it gave, and how long it took without waiting."""

    result: Any
    seconds: float


class Stopped(Exception):
    """The visitor is gone: leave the work."""


class Teller:
    """What a run tells its visitor through; it raises Stopped when there is none any more."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.stop = threading.Event()

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def __call__(self, event: Any) -> None:
        self.check()
        self.events.put(event)


def stream(work: Callable[[Teller], Any]) -> Iterator[Any]:
    """Call `work` in a thread; yield what it tells, at last what it returns (as `Done`, unless it already is one).

    When the consumer stops early, so does the work, the next time it tells or checks; only then does `close` return.
    """
    tell = Teller()

    def run() -> None:
        began = time.perf_counter()
        try:
            result = work(tell)
            tell.events.put(result if isinstance(result, Done) else Done(result, time.perf_counter() - began))
        except BaseException as error:
            tell.events.put(error)

    thread = threading.Thread(target=run, name="varkit-demo-run", daemon=True)
    thread.start()
    try:
        while True:
            event = tell.events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Done):
                return
    finally:
        tell.stop.set()
        thread.join()


def run(turns: Turns, call: Callable[..., Any], stages: Mapping[int, str]) -> Iterator[Any]:
    """A pipeline's call in its turn: a `Step` after each step, then `Done`.

    Args:
        call: takes `callback_on_step_end`.
        stages: numbers of tokens after which the first image is shown, and what is written below it.
    """

    def work(tell: Teller) -> Done:
        def on_step(pipeline: Any, step: int, position: int, state: dict[str, Any]) -> None:
            tell.check()
            tokens = state["tokens"][:1]
            image = pipeline.to_images(tokens)[0] if tokens.shape[1] in stages else None
            tell(Step(step + 1, state["num_steps"], image, stages.get(tokens.shape[1], "")))

        with turns.take():
            tell.check()
            began = time.perf_counter()
            result = call(callback_on_step_end=on_step)
            return Done(result, time.perf_counter() - began)

    return stream(work)
