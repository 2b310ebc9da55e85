"""Devices, process groups, random streams and the mapping of heads to ranks (L2)."""
