"""What a person watching a run is told, from any thread: who does what, step by step.

How it looks, bars on a terminal or plain lines elsewhere, is `flows.display`'s to decide; without a listener nothing
shows.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Listener(Protocol):
    """Shows progress; called from several threads at once."""

    def started(self, who: str, what: str, steps: int | None) -> None:
        """`who` began `what`, of so many steps where that is known."""

    def advanced(self, who: str) -> None:
        """`who` did one step."""

    def finished(self, who: str, what: str, seconds: float) -> None:
        """`who` is done with `what`."""

    def stopped(self, who: str) -> None:
        """`who` failed, or was interrupted."""

    def noted(self, text: str) -> None:
        """Something worth a line of its own happened."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` everything until the block ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def working(who: str, what: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
    """Tell that `who` does `what` while the block runs; the value is called after every step."""
    started = time.perf_counter()
    for listener in _listeners:
        listener.started(who, what, steps)
    try:
        yield functools.partial(_advance, who)
    except BaseException:
        for listener in _listeners:
            listener.stopped(who)
        raise
    for listener in _listeners:
        listener.finished(who, what, time.perf_counter() - started)


def _advance(who: str) -> None:
    for listener in _listeners:
        listener.advanced(who)


def note(text: str) -> None:
    """Tell something worth a line of its own."""
    for listener in _listeners:
        listener.noted(text)
