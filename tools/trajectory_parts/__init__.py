"""Executing a recorded trajectory of SGT, and comparing with it."""
