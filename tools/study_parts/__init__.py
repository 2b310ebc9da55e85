"""The paper's comparison, repeated: presets x seeds from one configuration, run in slices, then one table.

Starts training as processes and reads what they leave; never imports torch.
"""
