"""The door's table of every shipped method's options, so that they are checked before torch is imported.

A method's own Options class checks again, with what only it knows; a method that is not here is checked by it alone.
"""

from collections.abc import Mapping
from typing import Any

from meft_bench.fields import Choice, Kind, Pairs, Plain, Whole, check_table, one_line
from meft_bench.meft import config

_ACTIVATION = Choice(("relu", "silu"))
KINDS: dict[str, dict[str, Kind]] = {
    "base": {},
    "full": {},
    "lora": {"rank": Whole(1), "targets": Choice(("attention", "ffn", "all")), "alpha": Choice(("fixed", "rank"))},
    "adapter_h": {"size": Whole(1), "start": Choice(("normal", "identity"))},
    "parallel_adapter": {"neurons": Whole(1), "activation": _ACTIVATION},
    "parallel_adapter_offload": {"neurons": Whole(1), "activation": _ACTIVATION},
    "meft": config.FIELDS,
}
UNTRAINED = ("base",)
"""Methods that train nothing."""
NEEDED = {"meft": ("neurons",)}
SIZE = {"lora": "rank", "adapter_h": "size", "parallel_adapter": "neurons", "parallel_adapter_offload": "neurons",
        "meft": "neurons"}  # fmt: skip
"""The option that makes a method larger."""


def check_options(method: str, given: Any, whole: bool = True) -> None:
    """Raises ValueError for options that a shipped method does not have or take, and, if whole, for those it lacks."""
    Pairs(Plain()).check("options", given)
    kinds = KINDS.get(method)
    if kinds is None:
        return
    check_names(method, given, kinds)
    check_table({name: kinds[name] for name in given}, given)
    if whole and (missing := [name for name in NEEDED.get(method, ()) if name not in given]):
        raise ValueError(f"{method} needs the option {', '.join(missing)}")
    if method == "meft" and "neurons" in given and whole:
        config.MeftConfig(**given)


def check_names(method: str, given: Mapping[str, Any], known: Mapping[str, Any] | set[str]) -> None:
    """Raises ValueError for an option that the method does not have."""
    if unknown := sorted(set(given) - set(known)):
        listed = one_line(", ".join(unknown))
        raise ValueError(f"{method} has no option {listed}; it has: {', '.join(sorted(known)) or 'none'}")
