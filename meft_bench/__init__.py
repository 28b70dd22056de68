"""MEFT (arXiv 2406.04984): memory-efficient fine-tuning through sparse adapters, and the bench that checks it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meft_bench.integrations.peft_method import MeftConfig as MeftConfig
    from meft_bench.integrations.peft_method import clip_grad_norm_ as clip_grad_norm_
    from meft_bench.integrations.peft_method import make_optimizer as make_optimizer
    from meft_bench.integrations.trainer import prepare as prepare

__version__ = "0.1.0"

# Where each public name of the integrations lives; looked up on first use, so that importing the package loads nothing.
_LAZY = {
    "MeftConfig": "meft_bench.integrations.peft_method",
    "clip_grad_norm_": "meft_bench.integrations.peft_method",
    "make_optimizer": "meft_bench.integrations.peft_method",
    "prepare": "meft_bench.integrations.trainer",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
