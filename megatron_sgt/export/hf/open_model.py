"""A causal language model of transformers, from a checkpoint of this project or from a Hugging Face folder.

Generation and evaluation both go through here, so that a checkpoint behaves exactly like its export.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.errors import CheckpointError, DataError, SGTError, first_line
from megatron_sgt.export.architecture import TokenIds, hf_config
from megatron_sgt.export.forms import CAUSAL_LM, STANDARD, form_of
from megatron_sgt.export.hf.families import CONFIG_FILE, read_config
from megatron_sgt.export.hf.loading import own_class, quiet
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from megatron_sgt.export.hf_tensors import HFTensors
from megatron_sgt.export.inherited import config_ids, generation_values
from megatron_sgt.export.source import ExportSource, open_checkpoint
from megatron_sgt.model.mcore_config import DTYPES


@dataclass(frozen=True)
class OpenModel:
    """A model in evaluation mode. ``name``: for people; ``tokenizer``: of transformers, None without one.

    ``vocab_size``: ids that a text can have; the model's logits may have more rows, which pad the vocabulary.
    ``context``: tokens that it was trained to see at once. ``source``: None for a Hugging Face folder.
    """

    name: str
    model: Any
    tokenizer: Any
    vocab_size: int
    context: int
    source: ExportSource | None


def is_hf_folder(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face model folder, and not a checkpoint."""
    return (path / CONFIG_FILE).is_file()


def open_model(
    path: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    tokenizer: Path | None = None,
    keep_padding: bool = False,
    trust_remote_code: bool = False,
) -> OpenModel:
    """Open a checkpoint (a folder of them, or one) or a Hugging Face folder.

    Args:
        step: which checkpoint of a folder of them; None: the latest.
        dtype: "fp32", "bf16" or "fp16", of the weights; rotary frequencies stay fp32.
        tokenizer: file or folder, instead of the one that belongs to the model.
        keep_padding: keep the rows that pad a checkpoint's vocabulary.
        trust_remote_code: run a folder's own model code; else an SGT folder is read with this package's.

    Raises:
        CheckpointError: there is no model at ``path``, or it is damaged.
        DataError: the tokenizer cannot be read, or has ids that the model does not know.
    """
    if is_hf_folder(path):
        opened = _open_folder(path, dtype, trust_remote_code)
    else:
        opened = _open_checkpoint(open_checkpoint(path, step, keep_padding), dtype)
    model = opened.model.to(device).eval()
    found, ids = _tokenizer_of(opened, path, tokenizer)
    if opened.source is not None:
        model.generation_config = _generation_config(opened.source, ids)
    if found is not None and (size := len(found)) > opened.vocab_size:
        raise DataError(
            f"the tokenizer has {size} ids, but {opened.name} knows {opened.vocab_size}: it belongs to another model; "
            "give --tokenizer"
        )
    return OpenModel(opened.name, model, found, opened.vocab_size, opened.context, opened.source)


def _open_checkpoint(source: ExportSource, dtype: str) -> OpenModel:
    import transformers

    model, plan = source.config.model, source.plan()
    values = hf_config(model, plan, source.vocab_rows, dtype, TokenIds())
    name = values["architectures"][0]
    ours = name == STANDARD.architecture
    kind = own_class(STANDARD, CAUSAL_LM) if ours else getattr(transformers, name)
    values = {key: v for key, v in values.items() if key != "auto_map"} | config_ids(source.imported)
    config = kind.config_class.from_dict(values)
    weights: dict[str, Tensor] = {}
    for weight in source.weights():
        tensors, _ = source.read(weight)
        weights |= {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    with quiet():
        loaded, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=DTYPES[dtype], output_loading_info=True
        )
    _refuse_differences(str(source.folder), report)
    vocab_size = min(model.vocab_size or source.vocab_rows, source.vocab_rows)
    return OpenModel(str(source.folder), loaded, None, vocab_size, model.seq_length, source)


def _open_folder(path: Path, dtype: str, trust_remote_code: bool) -> OpenModel:
    from transformers import AutoModelForCausalLM

    HFTensors(path)  # finds missing and damaged shards, and names them
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in what is returned, and refused by name
        "use_safetensors": True,  # never a pickle that lies beside them
    }
    try:
        with quiet():
            if trust_remote_code:
                loaded, report = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
            else:
                form = form_of(read_config(path).model_type)
                kind = own_class(form, CAUSAL_LM) if form else AutoModelForCausalLM
                loaded, report = kind.from_pretrained(path, **options)
    except SGTError:
        raise
    except Exception as error:  # an unusual folder may raise anything in the library
        raise CheckpointError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from error
    _refuse_differences(str(path), report)
    config = loaded.config
    return OpenModel(str(path), loaded, None, config.vocab_size, config.max_position_embeddings, None)


def _refuse_differences(name: str, report: dict[str, Any]) -> None:
    """transformers only warns about missing or unknown weights, and draws new ones."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = report.get(kind) or ()
        if keys := sorted({key[0] if isinstance(key, tuple) else str(key) for key in found}):  # shapes behind the name
            raise CheckpointError(
                f"{name}: {len(keys)} {kind.replace('_', ' ')} in its weights: {', '.join(keys[:4])}; config.json and "
                "weights are of two models, or a part was not copied"
            )


def _generation_config(source: ExportSource, ids: TokenIds) -> Any:
    """As the export has it."""
    from transformers import GenerationConfig

    rows = source.vocab_rows
    unused = range(source.config.model.vocab_size or rows, rows)
    return GenerationConfig.from_dict(generation_values(source.imported, ids, unused))


def _tokenizer_of(opened: OpenModel, path: Path, chosen: Path | None) -> tuple[Any, TokenIds]:
    """The tokenizer of transformers, None without one; and the ids that generation needs, of a checkpoint's."""
    if chosen is None and opened.source is None:
        has_one = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        return _load_tokenizer(path, opened.model.config) if has_one else None, TokenIds()
    if chosen is None:
        assert opened.source is not None
        wanted = opened.source.config.data.tokenizer
        if wanted is None:
            return None, TokenIds()
    else:
        if not chosen.exists():
            raise DataError(f"tokenizer {chosen} does not exist; give a .model file, a tokenizer.json or a folder")
        wanted = TokenizerConfig.at(chosen)
    if opened.source is None:
        if wanted.type == "huggingface" and chosen is not None and chosen.is_dir():
            return _load_tokenizer(chosen), TokenIds()
        raise DataError(f"--tokenizer {chosen}: for a Hugging Face folder give a folder with a tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        # As the export would write it, so that texts are tokenized the same way before and after.
        written = write_tokenizer(wanted, Path(folder), opened.source.config)
        return _load_tokenizer(Path(folder)), written.ids


def _load_tokenizer(folder: Path, model_config: Any = None) -> Any:
    """``model_config``: of the model in the same folder, whose own code would be asked for without it."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, config=model_config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # OSError, ValueError, KeyError, or whatever a damaged file provokes
        raise DataError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
