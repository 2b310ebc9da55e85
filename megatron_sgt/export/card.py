"""The README.md of an exported folder: what the model is, how it grew, how to load it, what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sgt import __version__
from megatron_sgt.checkpoint.contents import Details, LoopingLayer
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.export.card_run import data_section, size_section, training_section, validation_section
from megatron_sgt.export.forms import form_of
from megatron_sgt.export.inherited import BASE_MODEL
from megatron_sgt.export.source import ExportSource
from megatron_sgt.growth import LoopPlan
from megatron_sgt.metrics.units import si

_PAPER = "[Sparse Growing Transformer](https://arxiv.org/abs/2603.23998)"
_CUSTOM = (
    "The model's code is part of this folder ({files}), so `transformers` asks for `trust_remote_code=True`: read "
    "it first if the folder does not come from you."
)
_CITATION = (
    "```bibtex",
    "@misc{sparse-growing-transformer,",
    "  title         = {Sparse Growing Transformer: Training-Time Sparse Depth Allocation via Progressive Attention "
    "Looping},",
    "  year          = {2026},",
    "  eprint        = {2603.23998},",
    "  archivePrefix = {arXiv},",
    "  url           = {https://arxiv.org/abs/2603.23998}",
    "}",
    "@software{megatron-sgt,",
    "  title   = {megatron\\_sgt: large-scale pretraining of the Sparse Growing Transformer},",
    f"  version = {{{__version__}}}",
    "}",
    "```",
)


def model_card(
    source: ExportSource,
    plan: LoopPlan,
    config: dict[str, Any],
    training_gates: bool,
    tokenizer_notes: Sequence[str] | None = None,
    license_id: str | None = None,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        config: the folder's ``config.json``.
        tokenizer_notes: what its user must know; None: the folder has no tokenizer.
        license_id: of the weights, as hubs name licences; None: the card says that none was named.
    """
    details = source.details
    form = form_of(config["model_type"])
    title = f"{'Sparse Growing Transformer' if plan.layers else 'Decoder'}, {si(details.parameters)} parameters"
    trust = ", trust_remote_code=True" if form else ""
    has_tokenizer = tokenizer_notes is not None
    lines = [
        *_front_matter(source, license_id),
        f"# {title}",
        "",
        _origin(source) + _began(details) + _grown(details) + _averaged(source) + _faded(source),
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        *([f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})'] if has_tokenizer else []),
        "```",
        "",
        *_growth_section(details.growth.layers, plan, training_gates),
        *size_section(source),
        "## Shape",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _shape(source, config)),
        "",
    ]
    if tokenizer_notes:
        lines += ["## Tokenizer", "", *(f"- {note}" for note in tokenizer_notes), ""]
    if form:
        code = ", ".join(f"`{name}`" for name in form.files)
        lines += ["## Custom code", "", _CUSTOM.format(files=code), "", form.about, ""]
    if details.step:  # of an import that was not trained on, nothing of the run has happened
        lines += [*data_section(source), *training_section(source), *validation_section(source)]
    lines += ["## Licence", "", _licence(license_id), "", "## Citation", "", *_CITATION, ""]
    return "\n".join(lines)


def _front_matter(source: ExportSource, license_id: str | None) -> list[str]:
    """YAML, with the fields that hubs know and nothing that was not named."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sgt", "megatron_sgt"],
        "license": license_id,
        "base_model": _base_model(source),
    }
    known = {name: value for name, value in values.items() if value is not None}
    return ["---", dump_yaml(known).rstrip("\n"), "---", ""]


def _base_model(source: ExportSource) -> str | None:
    return source.imported.get(BASE_MODEL)


def _origin(source: ExportSource) -> str:
    details, base = source.details, _base_model(source)
    begun = f"`{base}`" if base else "a model of another source"
    if not details.step:
        return f"Imported by megatron_sgt ({_PAPER}) from {begun}; no step has been trained since."
    first = f" The run began from {begun}." if source.imported else ""
    return (
        f"Pretrained with megatron_sgt ({_PAPER}): step {details.step:,} of {details.train_iters:,}, "
        f"{details.tokens:,} tokens, growth phase `{details.growth.phase}`.{first}"
    )


def _began(details: Details) -> str:
    """Whose weights the run began with, without the path of a machine."""
    if details.began is None:
        return ""
    which = "averaged weights" if details.began["weights"] == "ema" else "weights"
    loops = "" if details.began["growth"] == "keep" else ", without their loops"
    return (
        f" Its run began with the {which} of step {details.began['step']:,} of another run{loops}, which had been "
        f"trained on {details.began['tokens']:,} tokens before."
    )


def _licence(license_id: str | None) -> str:
    if license_id is None:
        return "None was named when this folder was made: ask whoever gave it to you."
    return f"`{license_id}`, as named when this folder was made."


def _grown(details: Details) -> str:
    if not details.grown:
        return ""
    steps = ", ".join(f"by `{operator}` after step {step:,}" for step, operator in details.grown)
    return f" The model became deeper or wider in training: {steps}."


def _averaged(source: ExportSource) -> str:
    if source.quantity != AVERAGE:
        return ""
    return f" These weights are the moving average over the run's steps, decay {source.details.ema_decay:g}."


def _faded(source: ExportSource) -> str:
    ramp = source.config.growth.ramp
    if source.mask >= 1 or ramp is None:
        return ""
    return (
        f" Its newest layers and units were being faded in until step {ramp.end:,}; the mask of this step, "
        f"{source.mask:.4g}, is in the weights."
    )


def _shape(source: ExportSource, config: dict[str, Any]) -> list[tuple[str, str]]:
    model = source.config.model
    rows, known = source.vocab_rows, model.vocab_size or source.vocab_rows
    padding = "" if rows == known else f", the last {rows - known} of them padding that no text has"
    return [
        ("architecture", config["architectures"][0]),
        ("layers, hidden size, MLP", f"{model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}"),
        ("query heads, key/value heads, head size",
         f"{model.num_attention_heads}, {model.num_query_groups}, {model.kv_channels}"),
        ("vocabulary", f"{rows:,} rows{padding}"),
        ("context", f"{config['max_position_embeddings']:,} tokens"),
        ("stored in", config["torch_dtype"]),
    ]  # fmt: skip


def _growth_section(layers: tuple[LoopingLayer, ...], plan: LoopPlan, training_gates: bool) -> list[str]:
    if not plan.layers:
        return []
    rows = [
        "## Growth history",
        "",
        "| layer | selected after step | loops | heads that loop |",
        "| --- | --- | --- | --- |",
    ]
    for n in layers:
        heads = ", ".join(map(str, n.kept_heads)) or "the whole layer"
        when = "from the start" if n.selected_at is None else f"{n.selected_at:,}"
        rows.append(f"| {n.layer} | {when} | {n.depth} | {heads} |")
    fading = [n for n, layer in plan.layers if layer.other_gate]
    if fading:
        gates = ", ".join(f"{plan[n].other_gate:.4g} in layer {n}" for n in fading)
        rows += ["", f"Exported inside a decay window with its gates: the other heads loop at {gates}."]
    elif any(n.other_gate for n in layers) and not training_gates:
        rows += [
            "",
            "Saved inside a decay window, exported with the gates of inference: kept heads 1, others 0.",
        ]
    return [*rows, ""]
