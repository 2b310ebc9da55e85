"""Proves that an exported folder is the same model as the project's own: logits, loss, cache, greedy text.

The project's model is Megatron-Core's with a tensor-parallel size of 1 and the checkpoint's weights rounded to the
stored type; both models compute in fp32. A further check runs the folder in its stored type, as its users will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt import __version__
from megatron_sgt.export.hf.loading import load_exported, only_greedy, quiet
from megatron_sgt.export.own_model import own_model
from megatron_sgt.export.parity_positions import TOLERANCE, probe_positions, rotary_gap
from megatron_sgt.export.to_hf import Export
from megatron_sgt.files import write_json
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.mcore_config import DTYPES

PARITY_FILE = "parity.json"
LOGITS, RELATIVE, LOSS = 1e-4, 3e-6, 1e-5
"""Absolute tolerance of logits in fp32, in proportion to the largest logit where that is more (above 33); of loss."""
STORED = {"bf16": (0.05, 0.02), "fp16": (0.01, 0.005)}
"""Of a folder run in its stored type: relative error of the logits (2-norm), and of the loss in nats."""
SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 2, 512, 8, 64


@dataclass(frozen=True)
class Check:
    """One comparison: passed if ``value`` is at most ``tolerance`` (NaN is not)."""

    name: str
    value: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance

    def line(self) -> str:
        return f"{self.name}: {self.value:.2e} (tolerance {self.tolerance:.0e}){'' if self.passed else '  FAILED'}"


@dataclass(frozen=True)
class Parity:
    """The result. ``mode``: "full", or "layers" where one layer at a time was in memory."""

    mode: str
    checks: tuple[Check, ...]
    probe: str

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def write(self, folder: Path, export: Export) -> None:
        values = {
            "passed": self.passed,
            "mode": self.mode,
            "checkpoint": export.source.folder.name,
            "step": export.source.details.step,
            "dtype": export.options.dtype,
            "probe": self.probe,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "versions": {"megatron_sgt": __version__}
            | {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        }
        write_json(folder / PARITY_FILE, values)


def probe_tokens(export: Export, count: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """[count, length] random token ids below the vocabulary size, the same every time."""
    model = export.source.config.model
    known = min(model.vocab_size or export.source.vocab_rows, export.source.vocab_rows)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(known, (count, min(length, model.seq_length)), generator=generator)


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; NaN where there is one."""
    return float((one - other).abs().max())


def logit_tolerance(logits: Tensor) -> float:
    """See LOGITS and RELATIVE."""
    return max(LOGITS, RELATIVE * float(logits.abs().max()))


def loss_of(logits: Tensor, tokens: Tensor) -> float:
    """Mean cross-entropy in nats of each token given those before it."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


@torch.no_grad()
@quiet()
def check_parity(export: Export, new_tokens: int = NEW_TOKENS) -> Parity:
    """Load the folder ``export`` and compare it, both models in fp32; ``new_tokens``: of the greedy continuation."""
    trust = export.form is not None
    tokens = probe_tokens(export)
    own = own_model(export.source, export.plan, DTYPES[export.options.dtype])
    theirs = load_exported(export.folder, torch.float32, trust)
    checks = list(_compare(own, theirs, tokens, export, new_tokens))
    if export.options.dtype in STORED:
        exact = theirs(tokens, use_cache=False).logits
        del own, theirs
        stored = load_exported(export.folder, "auto", trust)
        checks += _stored(stored(tokens, use_cache=False).logits.float(), exact, tokens, export.options.dtype)
    text = f"{tokens.shape[0]} sequences of {tokens.shape[1]} random tokens; {new_tokens} greedy tokens each"
    return Parity("full", tuple(checks), text)


def _compare(own: LanguageModel, theirs: Any, tokens: Tensor, export: Export, new_tokens: int) -> Iterator[Check]:
    rows = export.source.vocab_rows
    expected = own.logits(tokens)[..., :rows]
    found = theirs(tokens, use_cache=False).logits
    tolerance = logit_tolerance(expected)
    yield Check("logits, largest difference", largest_gap(found, expected), tolerance)
    yield Check("loss, difference", abs(loss_of(found, tokens) - loss_of(expected, tokens)), LOSS)
    yield from rotary_checks(own, theirs.model, export)

    def chunk(part: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = theirs(part, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    yield Check("logits, cached against uncached", largest_gap(through_cache(chunk, tokens), found), tolerance)
    prompts = tokens[:, :PROMPT]
    ends = only_greedy(theirs)
    text = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens)
    wrong = wrong_tokens(own, text, prompts.shape[1], export, ends, tolerance)
    yield Check("greedy continuation, differing tokens", float(wrong), 0.0)


def rotary_checks(own: LanguageModel, decoder: Any, export: Export) -> Iterator[Check]:
    """Of a model with scaled positions: these, up to its whole context."""
    if positions := probe_positions(export.source.config.model):
        gap = rotary_gap(own, decoder, positions)
        yield Check(f"rotary positions up to {positions[-1]:,}, largest difference of cos and sin", gap, TOLERANCE)


def through_cache(step: Callable[[Tensor, Any], tuple[Tensor, Any]], inputs: Tensor) -> Tensor:
    """What ``step`` makes of ``inputs`` [B, S, ...] in chunks: a half, a few single positions, the rest.

    Args:
        step: (chunk, cache; None at first) -> (its outputs [B, chunk, ...], the cache).
    """
    length = inputs.shape[1]
    half = max(1, length // 2)
    bounds = [0, *sorted({*range(half, min(half + 5, length)), length})]
    cache, parts = None, []
    for first, last in pairwise(bounds):
        out, cache = step(inputs[:, first:last], cache)
        parts.append(out)
    return torch.cat(parts, dim=1)


def wrong_tokens(
    own: LanguageModel, text: Tensor, prompt: int, export: Export, ends: list[int], tolerance: float
) -> int:
    """Tokens of ``text`` [B, S] after the first ``prompt`` that the project's model would not have chosen.

    One forward pass over the whole text suffices: by induction each token was chosen after the same text. Where two
    tokens are equally likely, up to twice the tolerance of logits, either is right. Behind one of ``ends`` there is
    padding.
    """
    model = export.source.config.model
    known = min(model.vocab_size or export.source.vocab_rows, export.source.vocab_rows)
    logits = own.logits(text)[:, prompt - 1 : -1, :known]
    chosen = text[:, prompt:]
    behind = logits.max(-1).values - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    ended = torch.isin(chosen, torch.tensor(ends, dtype=chosen.dtype)).int()
    alive = ended.cumsum(1) - ended == 0
    return int((~(behind <= 2 * tolerance) & alive).sum())


def _stored(found: Tensor, exact: Tensor, tokens: Tensor, dtype: str) -> list[Check]:
    relative, nats = STORED[dtype]
    error = float((found - exact).norm() / exact.norm())
    loss = abs(loss_of(found, tokens) - loss_of(exact, tokens))
    return [
        Check(f"run in {dtype}: logits, relative error", error, relative),
        Check(f"run in {dtype}: loss, difference", loss, nats),
    ]
