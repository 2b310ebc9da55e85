"""Texts through the store, and a store that does not answer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sgt.guard.store_channel import StoreChannel, StoreGoneError, bounded


def test_put_get_claim() -> None:
    channel = StoreChannel(dist.HashStore())
    assert channel.get(["a", "b"]) == [None, None]
    channel.put("a", "one")
    assert channel.get(["a", "b"]) == ["one", None]
    channel.put("b", "two")
    assert channel.get(["a", "b"]) == ["one", "two"]
    assert channel.claim("first", "me") == "me"
    assert channel.claim("first", "you") == "me"


def test_a_store_that_breaks() -> None:
    class Broken:
        def clone(self) -> Broken:
            return self

        def set_timeout(self, timeout: Any) -> None:
            pass

        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection refused")

    with pytest.raises(StoreGoneError, match="connection refused"):
        StoreChannel(Broken()).put("a", "one")


def test_bounded() -> None:
    assert bounded(lambda: 7, 5.0) == 7
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 5.0)
    never, start = threading.Event(), time.monotonic()
    with pytest.raises(StoreGoneError, match=r"no answer in 0\.1 s"):
        bounded(never.wait, 0.1)
    assert time.monotonic() - start < 5
    never.set()
