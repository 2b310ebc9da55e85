"""Pictures and pages of finished and running runs, from their run directories alone. No torch here.

Needs matplotlib (the `report` extra). Only what `metrics.jsonl` and `config.yaml` hold is shown; what is missing or
damaged is named on the page instead.
"""
