"""What other libraries would tell a user of the commands in many lines: left out, so that ours are seen."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HIDDEN_BARS = ("Loading weights",)


@contextmanager
def commands() -> Iterator[None]:
    """Warnings of other libraries for programmers are left out, unless python -W or PYTHONWARNINGS ask for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.filterwarnings("ignore", category=category)
        yield


def loaded_libraries() -> None:
    """The same for what is imported by now: transformers' log below errors, and its bar of weights being read. The
    bars of downloads stay."""
    if "transformers" not in sys.modules:
        return
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        logging.set_verbosity_error()
    if hasattr(logging, "set_tqdm_hook"):
        logging.set_tqdm_hook(_bar)


def _bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("desc") in _HIDDEN_BARS:
        kwargs = {**kwargs, "disable": True}
    return factory(*args, **kwargs)
