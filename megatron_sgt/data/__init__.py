"""Text to tokens, tokens to samples, samples to micro-batches.

Nothing is imported here: the worker processes of the preprocessing load single modules, without torch.
"""
