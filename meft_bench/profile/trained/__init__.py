"""U of a trained real model, logged: which neurons its micro-batches need, before and after training."""

NUMERICS = 1
"""Raised when a logged number can change otherwise than by the training loop, MEFT or a task (harness/numerics.py)."""
