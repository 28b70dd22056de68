"""MEFT and what one would pick instead on many GPUs and machines, simulated: `make profile GPUS=8`."""

NUMERICS = 5
"""Raised when a point can change otherwise than by the simulator or MEFT (harness/numerics.py)."""
