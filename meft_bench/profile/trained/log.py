"""The file of a trained model's logged selection: read and checked, and when it counts. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import goes_on, selection_numerics
from meft_bench.harness.published import SELECTION
from meft_bench.named import EMBEDDED, named_in
from meft_bench.reading import JSON_BYTES, read_json

SCHEMA = 1
FILE = SELECTION
COMMAND = "make selection"
_TITLES = {"smollm2-135m": "SmolLM2-135M"}
_POINT = ("tokens", "samples", "share_by_layer")


def read_log(path: Path) -> dict[str, Any]:
    """A log. Raises ValueError naming the file when it is broken."""
    try:
        log = read_json(path, JSON_BYTES, "log")
        if log["schema"] != SCHEMA:
            raise ValueError(f"schema {log['schema']} is not {SCHEMA}")
        log["settings"]["model"], log["settings"]["task"], log["numerics"], log["provenance"]
        for entry in log["entries"]:
            counts = [entry["neurons"], entry["kept"], *(p["tokens"] for p in entry["after"]["unions"])]
            if len(counts) < 3 or not all(type(n) is int and n > 0 for n in counts):
                raise ValueError("an entry has other sizes than whole numbers above 0")
            for point in entry["after"]["unions"]:
                _check(point)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path.name} is no logged selection of a trained model ({error}): delete it, and {COMMAND} writes one"
        ) from None
    return log


def _check(point: dict[str, Any]) -> None:
    tokens, samples, shares = (point[name] for name in _POINT)
    if type(samples) is not int or samples < 1 or not shares:
        raise ValueError(f"the point at {tokens} tokens counts nothing")
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s <= 1 for s in shares):
        raise ValueError(f"the point at {tokens} tokens has a share outside 0 to 1")


def counts(log: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether what is made now (of this provenance) may go on with the log, or use it."""
    settings = log["settings"]
    return goes_on(log, selection_numerics(settings["task"], settings["model"]), now)


def title_of(model: str) -> str:
    """The model of a log in words: SmolLM2-135M, or the name that the spec has."""
    name = named_in(model)
    if name is not None:
        return _TITLES.get(name, name)
    return "the embedded model" if model == EMBEDDED else model.removeprefix("local/").partition("@")[0]
