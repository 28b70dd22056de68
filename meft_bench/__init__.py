"""MEFT (arXiv 2406.04984): memory-efficient fine-tuning through sparse adapters, and the bench that checks it."""

__version__ = "0.1.0"
