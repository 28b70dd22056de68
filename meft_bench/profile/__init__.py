"""What fits on a card, how fast and at what traffic: one step of every method, measured on a GPU or simulated."""

NUMERICS = 7
"""Raised when a row can change otherwise than by the simulator or a method: what a step does, the variants, how a row
is made of what was counted (harness/numerics.py)."""
