"""What the harness asks becomes sequences of tokens; ``tests/engine/test_live_tasks.py`` compares the numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sgt.errors import DataError

pytest.importorskip("lm_eval")
from megatron_sgt.evaluation.harness_model import HarnessModel

BOS, EOS = 1, 2


class Letters:
    """One token per letter, its code."""

    bos, eod, boundaries = BOS, EOS, frozenset((BOS, EOS))
    beginning: int | None = BOS

    def encode(self, text: str) -> list[int]:
        return [ord(sign) for sign in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Live:
    """Remembers what it was asked."""

    max_length = 6

    def score(self, rows: Any) -> list[tuple[float, bool]]:
        self.rows = rows
        return [(-float(count), True) for _, count in rows]

    def continuations(self, contexts: Any, new_tokens: int, until: Any) -> list[list[int]]:
        self.asked = contexts, new_tokens, until
        return [[*map(ord, "abcd"), EOS] for _ in contexts]


@pytest.fixture
def model() -> HarnessModel:
    live: Any = Live()
    letters: Any = Letters()
    return HarnessModel(live, letters, add_bos=True)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_choices(model: HarnessModel) -> None:
    found = model.loglikelihood([request("ab", "cd"), request("", "cd"), request("abcdefgh", "ij")])
    abc = [ord(sign) for sign in "abcdefghij"]
    assert found == [(-2.0, True), (-2.0, True), (-2.0, True)]
    assert model.live.rows == [
        ([BOS, *abc[:4]], 2),
        ([BOS, *abc[2:4]], 2),
        (abc[3:], 2),  # cut off from the left
    ]
    with pytest.raises(DataError, match="asks for 7 tokens at once, but the model sees 6"):
        model.loglikelihood([request("a", "bcdefgh")])


def test_without_a_token_that_begins_texts(model: HarnessModel) -> None:
    letters: Any = Letters()
    plain = HarnessModel(model.live, letters, add_bos=False)
    for beginning in (BOS, None):
        letters.beginning = beginning
        plain.loglikelihood([request("ab", "c"), request("", "cd")])
        assert model.live.rows == [([*map(ord, "abc")], 1), ([beginning or EOS, *map(ord, "cd")], 2)]


def test_a_text_longer_than_the_model_sees_is_judged_in_windows(model: HarnessModel) -> None:
    assert model.loglikelihood_rolling([request("abcdefgh"), request("a")]) == [-9.0, -2.0]
    assert [count for _, count in model.live.rows] == [6, 3, 2]
    assert all(len(tokens) <= 7 for tokens, _ in model.live.rows)


def test_continuations(model: HarnessModel) -> None:
    given = {"until": ["d"], "max_gen_toks": 2, "do_sample": False}
    assert model.generate_until([request("xyzxyz", given), request("x", given)]) == ["abc", "abc"]
    assert model.live.asked == ([[*map(ord, "zxyz")], [BOS, ord("x")]], 2, ("d",))
    with pytest.raises(DataError, match="samples"):
        model.generate_until([request("x", {"do_sample": True})])
    with pytest.raises(DataError, match="asks for 256 new tokens, but the model sees 6"):
        model.generate_until([request("x", {})])
