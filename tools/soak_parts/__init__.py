"""A small run taken through hundreds of faults, to see that nothing is lost (tools/soak.py)."""
