"""MEFT (arXiv 2406.04984): memory-efficient fine-tuning through sparse adapters, and the bench that checks it.

The rooms, in their order: a room imports from those above it only, which tests/test_rooms.py checks.

    (root)        checks of values, files and texts, the hub; what imports nothing of ours but one another
    meft          the method: configuration, layer, routing, rows, optimizer, transfers
    provenance    which code and machine a number comes from
    simulate      a GPU and a link that only count: time and bytes of a step without a card
    tasks         what is learned and how answers are scored
    train         what a method is, the training loop, base models, the bytes of a step by formula
    baselines     the methods MEFT is compared with, one file each; train finds them by name
    embedded      the base model that ships, and its pretraining
    integrations  MEFT inside peft and transformers
    inputs        what a command line names, as a spec holds it
    harness       specs, suites, runs and their records
    bench         speed and bytes of the host engine on this machine
    profile       memory, traffic and time of every method on a card, simulated or measured
    gpu           one session on a machine with a GPU: CUDA tests, measured rows beside what was predicted
    finetune      adapters on a user's own rows
    neighbours    one test for each system that the paper is listed with
    export        runs and tasks in the form of other people's comparisons
    report        tables, figures and verdicts from records
    cli           the commands
"""

from pathlib import Path
from typing import TYPE_CHECKING

from meft_bench.version import __version__ as __version__

if TYPE_CHECKING:
    from meft_bench.integrations.peft_method import MeftConfig as MeftConfig
    from meft_bench.integrations.peft_method import clip_grad_norm_ as clip_grad_norm_
    from meft_bench.integrations.peft_method import count_background as count_background
    from meft_bench.integrations.peft_method import make_optimizer as make_optimizer
    from meft_bench.integrations.trainer import prepare as prepare

# In a checkout that nobody installed, baselines/ and tasks/ stand beside the package.
if not (Path(__file__).parent / "baselines").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# Where each public name of the integrations lives; looked up on first use, so that importing the package loads nothing.
_LAZY = {
    "MeftConfig": "meft_bench.integrations.peft_method",
    "clip_grad_norm_": "meft_bench.integrations.peft_method",
    "count_background": "meft_bench.integrations.peft_method",
    "make_optimizer": "meft_bench.integrations.peft_method",
    "prepare": "meft_bench.integrations.trainer",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
