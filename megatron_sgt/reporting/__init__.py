"""Pictures and pages of finished and running runs, made only from their run directories. No torch.

Needs matplotlib (the ``report`` extra). Shows what ``metrics.jsonl`` and ``config.yaml`` contain; the page names what
is missing or damaged.
"""
