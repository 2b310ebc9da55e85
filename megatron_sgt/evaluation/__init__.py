"""Measuring a model (L4)."""
