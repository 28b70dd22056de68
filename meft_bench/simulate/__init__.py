"""The same training code on a simulated GPU: sizes, copies and operations are followed, no tensor holds data."""

NUMERICS = 7
"""Raised when a simulated byte, operation or second can change (harness/numerics.py)."""
