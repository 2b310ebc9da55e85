"""A checkpoint's tensors as those of a deeper or wider model, which the maps of ``stages`` describe.

tensors.py       the maps applied
reader.py        a grown checkpoint that is read tensor by tensor and lies nowhere
state.py         the saved state of the run that goes on
offline.py       a grown checkpoint on disk
"""
