"""The only places where megatron.core or DeepSpeed internals are adapted."""
