"""What is kept of an imported model beside its weights: ids of special tokens, generation_config.json, its name.

It goes through training into the exports. A run's checkpoints carry it on (``layout.IMPORTED_STATE``), so that it does
not matter where the imported folder is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.architecture import TokenIds, generation_config

BASE_MODEL, TOKEN_IDS, GENERATION = "base_model", "token_ids", "generation_config"
"""Keys of what is kept: a hub's name for the model, ids as its config.json has them, its generation_config.json."""
GENERATION_FILE = "generation_config.json"

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_KEPT = ("transformers_version", "_from_model_config")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def read_inherited(folder: Path, config: Any, base_model: str | None = None) -> dict[str, Any]:
    """What to keep of the Hugging Face folder ``folder``, as JSON.

    Args:
        config: the transformers configuration of the folder.
        base_model: a hub's name for the model; None: that of the hub's cache, if the folder lies there.

    Raises:
        CheckpointError: ids that are none, or a generation_config.json that cannot be read.
    """
    ids = _ids_in({name: getattr(config, name, None) for name in _IDS}, config.vocab_size, folder / "config.json")
    generation = _read_generation(folder / GENERATION_FILE, config.vocab_size)
    kept = {BASE_MODEL: base_model or _name_in_cache(folder), TOKEN_IDS: ids, GENERATION: generation}
    return {name: value for name, value in kept.items() if value}


def _read_generation(path: Path, vocab_size: int) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again, or delete it") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object; copy it again, or delete it")
    others = {name: value for name, value in values.items() if name not in (*_NOT_KEPT, *_IDS)}
    return others | _ids_in(values, vocab_size, path)


def _ids_in(values: dict[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    """The ids of special tokens in ``values``; without those that the model has no row for, as -1 for "none"."""
    kept: dict[str, Any] = {}
    for name in _IDS:
        value = values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in listed):
            raise CheckpointError(f"{path}: {name} is {str(value)[:40]}, not an id or a list of ids; correct it")
        found = [i for i in listed if 0 <= i < vocab_size]
        if found:
            kept[name] = found if isinstance(value, list) else found[0]
    return kept


def _name_in_cache(folder: Path) -> str | None:
    """``owner/name`` where the folder is a snapshot in the hub's cache."""
    found = [match for part in folder.absolute().parts if (match := _CACHED.fullmatch(part))]
    return f"{found[-1][1]}/{found[-1][2]}" if found else None


def config_ids(inherited: dict[str, Any]) -> dict[str, Any]:
    """The entries of config.json that an export takes from the imported model instead of the tokenizer."""
    return dict(inherited.get(TOKEN_IDS, {}))


def generation_values(inherited: dict[str, Any], tokens: TokenIds, unused_ids: range) -> dict[str, Any]:
    """The contents of generation_config.json: the imported model's, with what the run's tokenizer and padding add.

    The token that ends the run's documents ends a text too, whatever else does.
    """
    ours = generation_config(tokens, unused_ids)
    theirs = {**config_ids(inherited), **inherited.get(GENERATION, {})}
    values = {**ours, **theirs}
    for name, own in (("eos_token_id", [] if tokens.eos is None else [tokens.eos]), ("suppress_tokens", unused_ids)):
        value = theirs.get(name)
        known = value if isinstance(value, list) else [] if value is None else [value]
        if known and (more := [i for i in own if i not in known]):
            values[name] = [*known, *more]
    return values
