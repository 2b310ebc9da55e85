"""vLLM plugin for exported Sparse Growing Transformers: both forms, ``sgt`` and ``sgt_serving``.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``). Importing this package
imports neither vLLM nor torch.
"""

MODEL = "vllm_sgt.model:SGTForCausalLM"
ARCHITECTURES = ("SGTForCausalLM", "SGTServingForCausalLM")


def register() -> None:
    """Make the configurations and the model known to transformers and vLLM. May be called more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_sgt.config import CONFIGS

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
