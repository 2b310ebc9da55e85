"""Everything that imports transformers: the model code for exported folders, and the tokenizer.

``configuration_sgt.py`` and ``modeling_sgt.py`` are copied into every folder of a grown model, where they run
without this package: they import torch and transformers only.
"""
