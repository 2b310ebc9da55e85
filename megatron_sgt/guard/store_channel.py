"""Short texts between ranks, through the key-value store of their rendezvous: no collective, no process group."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
"""How long the store may take to answer."""


class StoreGoneError(Exception):
    """The store does not answer: the process that keeps it (rank 0, unless torchrun does) is dead or stopped."""


class StoreChannel:
    """A separate connection to the store, so that it never waits for what the training thread asks.

    Raises:
        StoreGoneError: from every method, when the store does not answer.
    """

    def __init__(self, store: Any) -> None:
        self._store = store.clone()
        self._store.set_timeout(datetime.timedelta(seconds=PATIENCE_SECONDS))

    def put(self, key: str, text: str) -> None:
        self._ask(lambda: self._store.set(_full(key), text))

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """The values of ``keys``, None where there is none."""
        names = [_full(key) for key in keys]

        def ask() -> list[str | None]:
            if self._store.check(names):
                return [value.decode() for value in self._store.multi_get(names)]
            return [self._store.get(n).decode() if self._store.check([n]) else None for n in names]

        return self._ask(ask)

    def claim(self, key: str, text: str) -> str:
        """Set ``key`` unless it is set; return its value, which is ``text`` for the rank that was first."""
        return self._ask(lambda: self._store.compare_set(_full(key), "", text).decode())

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise StoreGoneError(str(error)) from error


def bounded(action: Callable[[], T], seconds: float) -> T:
    """``action()``, abandoned after ``seconds``: a store whose host is stopped never answers.

    Raises:
        StoreGoneError: time is up.
        Exception: whatever ``action`` raises.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(("done", action()))
        except BaseException as error:
            outcome.append(("failed", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise StoreGoneError(f"no answer in {seconds:g} s")
    kind, value = outcome[0]
    if kind == "failed":
        raise value
    return value


def _full(key: str) -> str:
    return f"sgt/watch/{key}"
