"""Pretraining of the Sparse Growing Transformer on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
