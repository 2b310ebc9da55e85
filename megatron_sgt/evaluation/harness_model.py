"""The live model in the form that lm-evaluation-harness asks for: the requests of its ``hf`` model, answered alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sgt.data.tokenizer import Tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.evaluation.live_model import LiveModel

_NEW_TOKENS = 256
"""Of a request that names no number, as of the harness's own models."""


class HarnessModel(TemplateLM):
    """Texts become tokens as in training.

    Args:
        add_bos: every text begins with the token for that, as the documents of training do. Without, it stands in front
            of a text of which all tokens are judged, if there is one, as the harness does with exports; else the end of
            the text before.
    """

    def __init__(self, live: LiveModel, tokenizer: Tokenizer, add_bos: bool) -> None:
        super().__init__()
        self.live = live
        self._text = tokenizer
        self._add_bos = add_bos

    @property
    def eot_token_id(self) -> int:
        return self._text.eod

    @property
    def prefix_token_id(self) -> int:
        return self._text.eod if self._text.beginning is None else self._text.beginning

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begins = [self._text.bos] if self._add_bos and add_special_tokens is not False else []
        return [*begins, *self._text.encode(string)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """What does not fit is cut off from the left."""
        most = self.live.max_length
        rows = []
        for _texts, context, continuation in requests:
            if len(continuation) > most:
                raise DataError(f"a task asks for {len(continuation)} tokens at once, but the model sees {most}")
            rows.append(([*context, *continuation][-(most + 1) :], len(continuation)))
        return self.live.score(rows)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.live.max_length, 1)
            windows += [(number, *make_disjoint_window(window)) for window in cut]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([(None, *window[1:]) for window in windows])
        for (number, *_), (chance, _same) in zip(windows, scored, strict=True):
            totals[number] += chance
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        found = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._settings(request.args[1]), []).append(number)
        for (new_tokens, until), numbers in alike.items():
            room = self.live.max_length - new_tokens
            if room < 1:
                raise DataError(
                    f"a task asks for {new_tokens} new tokens, but the model sees {self.live.max_length} at once; give "
                    "the task a smaller max_gen_toks"
                )
            contexts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            for number, ids in zip(numbers, self.live.continuations(contexts, new_tokens, until), strict=True):
                text = self._text.decode([token for token in ids if token not in self._text.boundaries])
                for stop in (stop for stop in until if stop):
                    text = text.split(stop)[0]
                found[number] = text
        return found

    @staticmethod
    def _settings(given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """(new tokens, texts that end it) of a request."""
        if given.get("do_sample") or float(given.get("temperature") or 0.0) > 0:
            raise DataError("a task samples (do_sample), but while a run trains texts are continued greedily alone")
        named = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        new_tokens = next((int(given[name]) for name in named if given.get(name) is not None), _NEW_TOKENS)
        until = given.get("until") or []
        return new_tokens, (until,) if isinstance(until, str) else tuple(until)
