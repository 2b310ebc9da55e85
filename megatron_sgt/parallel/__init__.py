"""Devices, process groups, random streams and collectives."""
