"""The forms of an exported model whose code travels with its folder: one record each, read wherever a form matters.

A plain model (Llama, Qwen2, Qwen3, ...) is of no form: transformers has its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CAUSAL_LM = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Form:
    """How a folder's code is laid out.

    name: what ``--for`` calls it. files: of ``export/hf/``, copied into the folder. auto_map: class of transformers ->
    "file.Class" in the folder, as ``config.json`` has it. passes_are_layers: ``num_hidden_layers`` counts attention
    passes, and ``sgt_num_layers`` the layers. about: what the card of an export says of it.
    """

    name: str
    model_type: str
    files: tuple[str, ...]
    auto_map: dict[str, str]
    passes_are_layers: bool
    about: str

    @property
    def architecture(self) -> str:
        """Name of the class of the language model."""
        return self.auto_map[CAUSAL_LM].split(".")[1]

    def head(self) -> dict[str, Any]:
        """How ``config.json`` begins."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "auto_map": dict(self.auto_map),
        }


_COMMON = (
    "configuration_sgt.py",
    "rotary_sgt.py",
    "attention_sgt.py",
    "mlp_sgt.py",
    "norms_sgt.py",
    "mask_sgt.py",
    "outputs_sgt.py",
    "cache_sgt.py",
    "generation_sgt.py",
    "modeling_sgt.py",
)

STANDARD = Form(
    name="standard",
    model_type="sgt",
    files=_COMMON,
    auto_map={
        "AutoConfig": "configuration_sgt.SGTConfig",
        "AutoModel": "modeling_sgt.SGTModel",
        CAUSAL_LM: "modeling_sgt.SGTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_sgt.SGTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_sgt.SGTForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_sgt.SGTForQuestionAnswering",
    },
    passes_are_layers=False,
    about="This is the form for transformers' own generation and training. vLLM and SGLang without a plugin, and "
    "continuous batching, need the same model exported with `--for serving`.",
)
"""For transformers' own generation and training: loops compute and cache their kept heads alone."""

SERVING = Form(
    name="serving",
    model_type="sgt_serving",
    files=(*_COMMON, "configuration_sgt_serving.py", "attention_sgt_serving.py", "modeling_sgt_serving.py"),
    auto_map={
        "AutoConfig": "configuration_sgt_serving.SGTServingConfig",
        "AutoModel": "modeling_sgt_serving.SGTServingModel",
        CAUSAL_LM: "modeling_sgt_serving.SGTServingForCausalLM",
    },
    passes_are_layers=True,
    about="This is the form for serving: `num_hidden_layers` in `config.json` counts attention passes, each with an "
    "entry of its own in the cache, and `sgt_num_layers` the layers.",
)
"""For runtimes with a cache of their own: every attention pass is a layer to them, with all heads."""

FORMS = {form.name: form for form in (STANDARD, SERVING)}


def form_of(model_type: str | None) -> Form | None:
    """The form of a folder with this ``model_type``; None: it is of no form."""
    return next((form for form in FORMS.values() if form.model_type == model_type), None)
