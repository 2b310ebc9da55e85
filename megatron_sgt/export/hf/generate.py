"""Continues prompts with transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.export.hf.open_model import OpenModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the most likely one.

    top_k: of so many most likely tokens, 0 for all; top_p: of the most likely tokens whose probabilities sum up
    to it. num_samples: continuations of every prompt.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: a value is outside its range.
        """
        if self.greedy and self.num_samples > 1:
            raise ConfigError(
                f"--num-samples {self.num_samples}: greedy continuations are all the same; give a --temperature"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"--temperature {self.temperature} must be at least 0, --top-k {self.top_k} at least 0, "
                f"--top-p {self.top_p} above 0 and at most 1"
            )


@dataclass(frozen=True)
class Continuation:
    """One sample: the text after the prompt, its tokens, and whether the model ended it by itself."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: bool


def check_prompts(prompts: Sequence[str]) -> None:
    """Check the prompts.

    Raises:
        DataError: there is no prompt.
    """
    if not prompts:
        raise DataError("no prompts: give --prompt TEXT, or --prompt-file with one prompt per line")


@torch.no_grad()
def generate(
    opened: OpenModel, prompts: Sequence[str], sampling: Sampling, batch_size: int = 8
) -> Iterator[Continuation]:
    """Continue every prompt ``sampling.num_samples`` times, in order, in batches of prompts.

    An empty prompt is the beginning of a document.

    Raises:
        DataError: a prompt is as long as the model's context, or empty and no token begins a document; the model has no
            tokenizer.
    """
    check_prompts(prompts)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise DataError(f"{opened.name} has no tokenizer; give --tokenizer PATH")
    encoded = [tokenizer(prompt)["input_ids"] or _beginning(opened) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + sampling.max_new_tokens > opened.context:
            raise DataError(
                f"prompt {prompt[:40]!r} has {len(ids)} tokens: with --max-new-tokens {sampling.max_new_tokens} it "
                f"is longer than the {opened.context} that the model was trained on"
            )
    ends = _ends(opened)
    torch.manual_seed(sampling.seed)
    for first in range(0, len(prompts), batch_size):
        batch = range(first, min(first + batch_size, len(prompts)))
        rows = _generate_batch(opened, [encoded[i] for i in batch], sampling, ends)
        for place, row in enumerate(rows):
            stop = next((i for i, token in enumerate(row) if token in ends), None)
            tokens = row if stop is None else row[:stop]
            index = batch[place // sampling.num_samples]
            text = _new_text(tokenizer, encoded[index], tokens)
            yield Continuation(prompts[index], text, tuple(tokens), stop is not None)


def _beginning(opened: OpenModel) -> list[int]:
    """What precedes the first token of a document: as ``generate`` without input begins, else the end of another one.

    Raises:
        DataError: the model has neither.
    """
    begin = opened.model.generation_config.bos_token_id
    found = [*([] if begin is None else [begin]), *_ends(opened)]
    if not found:
        raise DataError(
            f"a prompt is empty, and {opened.name} has no token that begins or ends a document: give a longer prompt"
        )
    return found[:1]


def _new_text(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What ``tokens`` add to the text; decoded alone, they would lose a leading space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    known = tokenizer.decode(list(before), **options)
    return tokenizer.decode([*before, *tokens], **options)[len(known) :]


def _ends(opened: OpenModel) -> tuple[int, ...]:
    found = opened.model.generation_config.eos_token_id
    found = opened.tokenizer.eos_token_id if found is None else found
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _generate_batch(
    opened: OpenModel, encoded: Sequence[Sequence[int]], sampling: Sampling, ends: tuple[int, ...]
) -> list[list[int]]:
    """New tokens of every sample, in order; prompts are padded on the left with a token that is masked."""
    width, device = max(map(len, encoded)), opened.model.device
    padding = ends[0] if ends else 0
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    chance = (
        {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if sampling.greedy
        else {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    )
    whole = opened.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.num_samples,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        **chance,
    )
    return whole[:, width:].tolist()
