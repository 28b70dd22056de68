"""The package's version: one place, which imports nothing."""

__version__ = "0.1.0"
