"""The parts of tools/bench/gpu_suite.py: each measures one thing and returns rows that json can hold."""
