"""MEFT (arXiv 2406.04984): memory-efficient fine-tuning through sparse adapters, and the bench that checks it."""

__version__ = "0.1.0"

# Where each public name of the integrations lives; looked up on first use, so that importing the package loads nothing.
_LAZY = {
    "MeftConfig": "meft_bench.integrations.peft_method",
    "make_optimizer": "meft_bench.integrations.peft_method",
    "prepare": "meft_bench.integrations.trainer",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
