"""The families of models that people will try to import: what becomes of each, and why some are refused.

``docs/huggingface.md`` holds these rows (``table``); ``families.py`` reads the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Imported:
    """A family that can be imported.

    Args:
        models: for people.
        types: values of ``model_type``.
        exported: the class of an export in which nothing loops.
        refused: what of the family cannot be imported, and why.
    """

    models: str
    types: tuple[str, ...]
    exported: str
    refused: str


@dataclass(frozen=True)
class Refused:
    """A family that cannot be imported. ``why``: after "it", in one message each."""

    models: str
    types: tuple[str, ...]
    why: str


_ATTENTION_BIASES = "biases in attention alone (here they are in all projections, in none, or in q/k/v alone)"

IMPORTED = (
    Imported(
        "Llama 1 to 3, and what was made of them: SmolLM 1 and 2, TinyLlama, Yi, DeepSeek LLM, ...",
        ("llama",),
        "LlamaForCausalLM",
        _ATTENTION_BIASES,
    ),
    Imported("Mistral 7B, Ministral of `model_type: mistral`", ("mistral",), "LlamaForCausalLM", ""),
    Imported("Qwen2, Qwen2.5, QwQ, dense", ("qwen2",), "Qwen2ForCausalLM", ""),
    Imported("Qwen3, dense", ("qwen3",), "Qwen3ForCausalLM", _ATTENTION_BIASES),
    Imported("OLMo-2", ("olmo2",), "Olmo2ForCausalLM", "biases"),
    Imported(
        "OLMo-3",
        ("olmo3",),
        "Olmo2ForCausalLM",
        "biases; positions that are scaled in its full layers and not in its sliding ones (its long contexts), as all "
        "layers rotate alike here",
    ),
)

REFUSED = (
    Refused("OLMo-1", ("olmo",), "its norms have no weights, and it clips queries, keys and values"),
    Refused(
        "SmolLM3",
        ("smollm3",),
        "it does not rotate queries and keys in every fourth layer, and all layers rotate alike here",
    ),
    Refused("Gemma 1", ("gemma",), "its norms multiply by 1 + weight, and its embeddings are scaled"),
    Refused(
        "Gemma 2",
        ("gemma2",),
        "it has norms on both sides of attention and MLP, and caps its logits",
    ),
    Refused(
        "Gemma 3",
        ("gemma3", "gemma3_text"),
        "it has norms on both sides of attention and MLP, and other rotary positions in its sliding layers",
    ),
    Refused("Phi-1, Phi-2", ("phi",), "its attention and MLP run side by side, and it rotates a part of each head"),
    Refused(
        "Phi-3, Phi-3.5, Phi-4",
        ("phi3",),
        "its query, key and value projections are one tensor, gate and up another, and some rotate a part of each head",
    ),
    Refused(
        "Granite 3",
        ("granite",),
        "it multiplies embeddings, attention, residuals and logits by constants of its own",
    ),
    Refused(
        "Mixtral, Qwen-MoE, OLMoE, Granite-MoE, Phi-3.5-MoE, DBRX",
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "dbrx"),
        "it is a mixture of experts",
    ),
    Refused(
        "DeepSeek V2, V3, R1",
        ("deepseek_v2", "deepseek_v3"),
        "it is a mixture of experts, and its attention is latent (MLA)",
    ),
    Refused("gpt-oss", ("gpt_oss",), "it is a mixture of experts, and its attention has sinks"),
    Refused(
        "Llama 4",
        ("llama4", "llama4_text"),
        "it is a mixture of experts, and some of its layers do not rotate queries and keys",
    ),
    Refused(
        "Qwen3-Next",
        ("qwen3_next",),
        "it is a mixture of experts, and most of its layers have linear attention",
    ),
    Refused(
        "Mamba, Jamba, Zamba",
        ("mamba", "mamba2", "jamba", "zamba", "zamba2"),
        "it has state-space layers, which have no heads to loop as here",
    ),
    Refused(
        "GPT-NeoX, Pythia",
        ("gpt_neox",),
        "its attention and MLP run side by side, and it rotates a part of each head",
    ),
    Refused("GPT-J, CodeGen", ("gptj", "codegen"), "its attention and MLP run side by side, and it rotates in pairs"),
    Refused("GPT-2, GPT-Neo, OPT", ("gpt2", "gpt_neo", "opt"), "its positions are learned embeddings"),
    Refused("BLOOM, MPT", ("bloom", "mpt"), "its positions are biases of the attention (ALiBi)"),
    Refused(
        "Falcon",
        ("falcon",),
        "its attention and MLP run side by side, and its query, key and value projections are one tensor",
    ),
    Refused(
        "StarCoder, StarCoder2",
        ("gpt_bigcode", "starcoder2"),
        "its MLP is the tanh form of GELU, which is another function than GELU here",
    ),
    Refused("StableLM", ("stablelm",), "it rotates a part of each head"),
    Refused(
        "Cohere Command R, Aya",
        ("cohere", "cohere2"),
        "its attention and MLP run side by side, and its logits are scaled",
    ),
    Refused("Nemotron", ("nemotron",), "its norms multiply by 1 + weight, and its MLP squares a ReLU"),
    Refused("GLM-4", ("glm", "glm4"), "it rotates a part of each head, in pairs, and gate and up are one tensor"),
    Refused(
        "EXAONE 4",
        ("exaone4",),
        "it does not rotate queries and keys in its full layers, and all layers rotate alike here",
    ),
    Refused("ERNIE 4.5, Helium", ("ernie4_5", "helium"), "it rotates neighbouring dimensions of a head in pairs"),
    Refused("Hunyuan", ("hunyuan_v1_dense",), "it normalises queries and keys after their rotation"),
    Refused("Apertus, Arcee", ("apertus", "arcee"), "its MLP has no gate, and an activation that is not known here"),
    Refused("BitNet", ("bitnet",), "its weights are ternary, and it has norms inside attention and MLP"),
)

WHY_REFUSED = {name: one.why for one in REFUSED for name in one.types}
"""``model_type`` -> the reason, after "it"."""


def table() -> list[str]:
    """The rows of the two tables of the documentation, in Markdown."""
    rows = ["| family | `model_type` | plain export | not imported |", "| --- | --- | --- | --- |"]
    rows += [f"| {one.models} | {_names(one.types)} | `{one.exported}` | {one.refused} |" for one in IMPORTED]
    rows += ["", "| family | `model_type` | refused, as |", "| --- | --- | --- |"]
    return rows + [f"| {one.models} | {_names(one.types)} | {one.why} |" for one in REFUSED]


def _names(types: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in types)
