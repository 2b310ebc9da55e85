"""Hints for unknown keys: misspelt, misplaced, or another project's name."""

import difflib

from pydantic import BaseModel

from megatron_sgt.config.base import section_class

FOREIGN_NAMES = {
    # gpt-neox and Megatron-DeepSpeed
    "attention_config": "model.num_query_groups",
    "checkpoint_activations": "train.recompute_granularity",
    "gradient_clipping": "optim.clip_grad",
    "keep_last_n_checkpoints": "checkpoint.keep_last",
    "max_position_embeddings": "model.seq_length",
    "model_parallel_size": "parallel.tensor_model_parallel_size",
    "norm": "model.normalization",
    "pipe_parallel_size": "parallel.pipeline_model_parallel_size",
    "pipe_partition_method": "parallel.pipeline_model_parallel_layout",
    "rotary_emb_base": "model.rotary_base",
    "train_batch_size": "train.global_batch_size",
    "train_data_paths": "data.data_path",
    "valid_data_path": "data.valid",
    "valid_data_paths": "data.valid",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "zero_optimization": "parallel.zero_stage",
    # Megatron-LM
    "accumulate_allreduce_grads_in_fp32": "optim.grad_accum_dtype",
    "bf16": "train.precision",
    "account_for_embedding_in_pipeline_split": "parallel.pipeline_model_parallel_layout (the embedding costs nothing)",
    "account_for_loss_in_pipeline_split": "parallel.pipeline_model_parallel_layout (auto counts the output layer)",
    "decoder_first_pipeline_num_layers": "parallel.pipeline_model_parallel_layout",
    "decoder_last_pipeline_num_layers": "parallel.pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage": "parallel.pipeline_model_parallel_layout",
    "num_layers_in_last_pipeline_stage": "parallel.pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual_pipeline_model_parallel_size (parts of a stage)",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline_model_parallel_size",
    "data_parallel_size": "parallel.tensor_model_parallel_size (data parallelism is the rest of the ranks)",
    "exit_duration_in_mins": "train.exit_duration_minutes",
    "distributed_timeout": "parallel.distributed_timeout_minutes",
    "fp16": "train.precision",
    "grad_reduce_in_fp32": "optim.grad_reduce_dtype",
    "group_query_attention": "model.num_query_groups",
    "inter_document_masking": "data.reset_attention_mask and data.reset_position_ids",
    "norm_epsilon": "model.layernorm_epsilon",
    "save_retain_interval": "checkpoint.keep_every",
    "finetune": "checkpoint.start (weights)",
    "no_load_optim": "checkpoint.start (weights)",
    "swiglu": "model.activation",
    "tokenizer_model": "data.tokenizer.model",
    "tokenizer_type": "data.tokenizer.type",
    "train_samples": "train.train_iters",
    "use_distributed_optimizer": "parallel.zero_stage",
    # Hugging Face
    "attention_bias": "model.add_qkv_bias",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from the batch sizes)",
    "gradient_checkpointing": "train.recompute_granularity",
    "head_dim": "model.kv_channels",
    "hidden_act": "model.activation",
    "initializer_range": "model.init_method_std",
    "intermediate_size": "model.ffn_hidden_size",
    "learning_rate": "optim.lr",
    "logging_steps": "logging.log_interval",
    "max_grad_norm": "optim.clip_grad",
    "max_steps": "train.train_iters",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "output_dir": "logging.run_dir",
    "per_device_train_batch_size": "train.micro_batch_size",
    "rms_norm_eps": "model.layernorm_epsilon",
    "rope_parameters": "model.rotary_scaling",
    "rope_scaling": "model.rotary_scaling",
    "rope_theta": "model.rotary_base",
    "rope_type": "model.rotary_scaling.type",
    "save_steps": "checkpoint.save_interval",
    "save_total_limit": "checkpoint.keep_last",
    "tie_word_embeddings": "model.untie_embeddings_and_output_weights (its opposite)",
    "warmup_steps": "optim.lr_warmup_iters",
    # torchtitan, OLMo, GPT-2 and others
    "betas": "optim.adam_beta1 and optim.adam_beta2",
    "d_model": "model.hidden_size",
    "document_masking": "data.reset_attention_mask and data.reset_position_ids",
    "decay": "growth.decay_type",
    "dtype": "train.precision",
    "max_seq_len": "model.seq_length",
    "max_sequence_length": "model.seq_length",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads",
    "n_kv_heads": "model.num_query_groups",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "n_positions": "model.seq_length",
    "pipeline_parallel_degree": "parallel.pipeline_model_parallel_size",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "tensor_parallel_degree": "parallel.tensor_model_parallel_size",
    "total_steps": "train.train_iters",
    "warmup": "optim.lr_warmup_iters",
}
"""Other projects' names -> ours."""


DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "data_types", "disable_allgather", "dump_state", "elasticity", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor",
    "memory_breakdown", "optimizer", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print",
    "tensor_parallel", "tensorboard", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""The usual keys of DeepSpeed's JSON (https://www.deepspeed.ai/docs/config-json), which ignores unknown keys."""


def misspelt_deepspeed_key(key: str) -> str | None:
    """Return the DeepSpeed key that ``key`` is probably a misspelling of; None if it is one, or resembles none."""
    if key in DEEPSPEED_KEYS:
        return None
    close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
    return close[0] if close else None


def section_at(root: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel] | None:
    """Return the class of the section at ``path`` below ``root``, or None if there is none."""
    section = root
    for name in path:
        field = section.model_fields.get(name)
        inner = section_class(field.annotation) if field else None
        if inner is None:
            return None
        section = inner
    return section


def all_keys(root: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all fields below ``root``, sections included."""
    keys = []
    for name, field in root.model_fields.items():
        keys.append(prefix + name)
        inner = section_class(field.annotation)
        if inner is not None:
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys


def unknown_key(root: type[BaseModel], path: tuple[str, ...]) -> str:
    """Return the line for the unknown key at ``path``, with what was probably meant."""
    *parents, key = path
    line = f"unknown key '{'.'.join(path)}'"
    name = key.lstrip("-").replace("-", "_")
    section = section_at(root, tuple(parents))
    siblings = list(section.model_fields) if section is not None else []
    for meant in (name, f"{parents[-1]}_{name}" if parents else name):  # train.iters: train.train_iters
        if meant in siblings:
            return f"{line}; did you mean '{meant}'?"
    keys = all_keys(root)
    misplaced = [known for known in keys if known.rpartition(".")[2] == name]
    if misplaced and name not in FOREIGN_NAMES:
        return f"{line}; did you mean '{misplaced[0]}'?"
    if name.lower() in FOREIGN_NAMES:
        target, _, note = FOREIGN_NAMES[name.lower()].partition(" ")
        return f"{line}; did you mean '{target}'{' ' + note if note else ''}?"
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"{line}; did you mean '{close[0]}'?"
    names = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = difflib.get_close_matches(name, list(names), n=1)
    if close:
        return f"{line}; did you mean '{names[close[0]]}'?"
    return f"{line}; known here: {', '.join(siblings)}"
