"""results/paper/claims.yaml: read and checked. What the fields mean stands at the head of that file."""

import math
from pathlib import Path
from typing import Any

import yaml

from meft_bench.report.records import quantities as q

SCALES = ("small", "pretrained", "scale")
"""Where a claim may be tested: on the embedded model, on SmolLM2-135M, and on the paper's own models."""
BOUNDS = ("above", "below", "within")
_CLAIM_KEYS = {"id", "where", "family", "says", "paper", "note", "because", *SCALES, "shows"}
_DISCREPANCY_KEYS = {"what", "paper", "code", "default", "shows", "unshown"}
_QUANTITY_KEYS = {"difference", "score", "measure", "of", "bench", "frontier", "metric", "split", "over", "minus",
                  "label", "exact"}  # fmt: skip


def load_claims(path: Path) -> dict[str, Any]:
    """The checked file. Raises ValueError naming the claim and what is wrong with it."""
    try:
        book = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the claims {path.name} ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(book, dict) or set(book) != {"rules", "families", "claims", "discrepancies"}:
        raise ValueError(f"{path.name} needs rules, families, claims and discrepancies, and nothing else")
    for name in ("claims", "discrepancies"):
        if not isinstance(book[name], list) or not all(isinstance(entry, dict) for entry in book[name]):
            raise ValueError(f"{path.name}: {name} must be a list of entries")
    if not isinstance(book["rules"], dict) or not {"seeds", "alpha"} <= set(book["rules"]):
        raise ValueError(f"{path.name}: rules needs seeds and alpha")
    seen: set[str] = set()
    for entry in book["claims"]:
        name = entry.get("id", "a claim without an id")
        try:
            _check_claim(entry, book["families"])
            if name in seen:
                raise ValueError("the id stands twice")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path.name}, {name}: {error}") from None
        seen.add(name)
    for entry in book["discrepancies"]:
        try:
            _check_keys(entry, {"what", "paper", "code", "default"}, _DISCREPANCY_KEYS)
            if bool(entry.get("shows")) == bool(entry.get("unshown")):
                raise ValueError("give shows, or unshown: why no run compares them")
            for part in entry.get("shows", ()):
                _check_quantity(part)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path.name}, {entry.get('what', 'a discrepancy')}: {error}") from None
    return book


def _check_claim(entry: dict[str, Any], families: dict[str, str]) -> None:
    _check_keys(entry, {"id", "where", "family", "says"}, _CLAIM_KEYS)
    if entry["family"] not in families:
        raise ValueError(f"unknown family {entry['family']!r}; known: {', '.join(families)}")
    if not any(where in entry for where in SCALES):
        raise ValueError("it has no test: give parts under small, pretrained or scale")
    for part in (part for where in SCALES for part in entry.get(where, ())):
        bounds = [b for b in BOUNDS if b in part]
        if len(bounds) != 1:
            raise ValueError(f"a part needs one of {', '.join(BOUNDS)}, got {len(bounds)}: {part}")
        limits = part[bounds[0]] if bounds[0] == "within" else [part[bounds[0]]]
        if len(limits) != 1 + (bounds[0] == "within") or not all(_is_number(x) for x in limits):
            raise ValueError(f"{bounds[0]} takes {'two numbers' if bounds[0] == 'within' else 'a number'}: {part}")
        _check_quantity({k: v for k, v in part.items() if k not in BOUNDS})
    for shown in entry.get("shows", ()):
        _check_quantity(shown)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(entry: dict[str, Any], needed: set[str], known: set[str]) -> None:
    if missing := sorted(needed - set(entry)):
        raise ValueError(f"lacks {', '.join(missing)}")
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"unknown key {', '.join(unknown)}")


def _check_quantity(entry: dict[str, Any]) -> None:
    kinds = [k for k in ("difference", "score", "measure", "bench", "frontier") if k in entry]
    if len(kinds) != 1:
        raise ValueError(f"a quantity is one of difference, score, measure, bench, frontier: {entry}")
    if unknown := sorted(set(entry) - _QUANTITY_KEYS):
        raise ValueError(f"unknown key {', '.join(unknown)}: {entry}")
    references = {
        "difference": entry.get("difference", []),
        "score": [entry.get("score")],
        "measure": [entry.get("of")],
    }
    if kinds[0] == "difference" and len(entry["difference"]) != 2:
        raise ValueError(f"a difference is of two places: {entry}")
    for reference in references.get(kinds[0], []):
        q.parse_reference(str(reference))
    if kinds[0] == "measure" and entry["measure"] not in q.MEASURES:
        raise ValueError(f"unknown measure {entry['measure']!r}; known: {', '.join(q.MEASURES)}")
    if kinds[0] == "frontier" and (len(entry["frontier"]) != 2 or any(len(p.split()) != 3 for p in entry["frontier"])):
        raise ValueError(f"a frontier is of two places, ROW[,ROW...] SHARE TASK each: {entry}")
    if kinds[0] == "bench" and "." not in entry["bench"]:
        raise ValueError(f"a benchmark is FILE.FIELD: {entry}")
    for inner in ("over", "minus"):
        if inner in entry:
            _check_quantity(entry[inner])
