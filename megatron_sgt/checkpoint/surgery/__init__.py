"""Growing models: a checkpoint's tensors as those of a deeper or wider model.

Every new tensor is ``new[i] = scale[i] · old[index[i]]`` along each axis; where the index is -1, an initial value or
zero. The same map serves weights, fp32 masters and AdamW's moments. docs/growing.md has the methods and their sources.

    operators/       one file per method: from a model and options to a ``Growth``
    growth.py        what a method decides: new layers from old ones, new units from old ones
    maps.py          what follows for every tensor, from the table of weights
    optimizer.py     what becomes of AdamW's step and moments
    tensors.py       the maps applied
    reader.py        a grown checkpoint that is read tensor by tensor and lies nowhere
    config.py, state.py
                     the configuration and the saved state of the run that goes on
    offline.py       a grown checkpoint on disk
"""
