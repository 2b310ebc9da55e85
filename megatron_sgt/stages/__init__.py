"""Models that grow while they train: the stages of a run, and what a method of growth decides. No torch.

    stages.py        the stages of a configuration: from which step to which, with which model
    operators/       one file per method: from a model and options to a ``Growth``
    growth.py        what a method decides: new layers from old ones, new units from old ones
    maps.py          what follows for every tensor, from the table of weights
    optimizer.py     what becomes of AdamW's step and moments
    policy.py        how policies are written
    learning_rate.py how the learning rate goes on in a new stage
    config.py        the configuration that trains a grown model
    search.py        how deep the next stage should be: candidates, and the score that chooses one

Every new tensor is ``new[i] = scale[i] · old[index[i]]`` along each axis; where the index is -1, an initial value or
zero. The same map serves weights, fp32 masters and AdamW's moments. docs/growing.md has the methods and their sources;
checkpoint/surgery applies the maps to checkpoints.
"""
