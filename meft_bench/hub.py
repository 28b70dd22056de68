"""The hub that models and data sets come from: one that does not answer costs seconds, not minutes.

The hub's own libraries try each file six times. Here the first thing asked for is asked for once, with a limit; when no
answer comes, this process (and what it starts) works from the cache alone, or ends with one line.
"""

import os
import sys
import threading
from functools import cache
from pathlib import Path

from meft_bench.named import EMBEDDED

ANSWER_S = 5.0
"""Seconds within which the hub must have answered, its name being looked up included."""


def check_model(source: str | Path, revision: str | None = None) -> None:
    """Raises ValueError where a model is to come from a hub that does not answer and is not in the cache.

    source: as models.load_model takes it; folders and the embedded model need no hub.
    """
    if isinstance(source, Path) or source == EMBEDDED or Path(source).exists() or _answers(source, "model"):
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        raise ValueError(f"{_silence(source)}: check the network and the name, or give a folder with --model")


def check_data(name: str) -> None:
    """Work from the cache where the hub does not answer; what is not there is told by whoever loads it."""
    _answers(name, "dataset")


def _silence(name: str) -> str:
    return f"the hub does not answer within {ANSWER_S:g} s, and {name} is not in the cache"


@cache
def _answers(repository: str, kind: str) -> bool:
    """Whether the hub says anything about a repository; if not, this process is offline from now on."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True  # the user's own choice, which the libraries tell in their own words
    get_session()  # reads certificates, which is none of the hub's seconds
    found: list[int] = []
    # In a thread: looking up a name has no time limit of its own.
    asking = threading.Thread(target=_ask, args=(repository, kind, found), daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if found and found[0] < 500:
        return True
    _go_offline()
    return False


def _ask(repository: str, kind: str, found: list[int]) -> None:
    from huggingface_hub import constants, get_session

    path = (
        f"{repository}/resolve/main/config.json" if kind == "model" else f"datasets/{repository}/resolve/main/README.md"
    )
    url = f"{constants.ENDPOINT}/{path}"
    try:
        found.append(get_session().head(url, timeout=ANSWER_S).status_code)
    except Exception:  # whatever it is, it is no answer
        return


def _go_offline() -> None:
    """For the libraries that are loaded, and for processes that are started."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    if "datasets" in sys.modules:
        from datasets import config

        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
