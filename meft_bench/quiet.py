"""What other libraries would tell a user of the commands in many lines: left out, so that ours are seen."""

import logging
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


def ranks() -> None:
    """Before torch is imported: what its C++ tells of a rank that is gone, with addresses in the code, is left out."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def loaded_libraries() -> None:
    """The same for what is imported by now: logs below errors of transformers and lm-eval, and the bar of weights being
    read. The bars of downloads stay."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as log

        if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
            log.set_verbosity_error()
        if hasattr(log, "set_tqdm_hook"):
            log.set_tqdm_hook(_bar)
    if "lm_eval" in sys.modules:
        from lm_eval import evaluator

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if hasattr(evaluator, "get_git_commit_hash"):  # outside a checkout git complains on the terminal
            setattr(evaluator, "get_git_commit_hash", lambda: None)  # noqa: B010


def _bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("desc") in _HIDDEN_BARS:
        kwargs = {**kwargs, "disable": True}
    return factory(*args, **kwargs)
