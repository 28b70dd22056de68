"""What a quantity of claims.yaml is called, and which lines of the suite it reads."""

from typing import Any

from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Line, Results


def lines_of(*entries: dict[str, Any]) -> tuple[Line, ...]:
    """The (row, share) of every place that these quantities read, each once."""
    found: dict[Line, None] = {}
    for entry in entries:
        own = [*entry.get("difference", ()), *(entry[k] for k in ("score", "of") if k in entry)]
        found |= dict.fromkeys(parse_reference(str(reference))[:2] for reference in own)
        found |= dict.fromkeys(lines_of(*(entry[k] for k in ("over", "minus") if k in entry)))
    return tuple(found)


def label_of(entry: dict[str, Any], results: Results) -> str:
    """What a quantity is called; nominal sizes have their real share behind them where it is another."""
    other = [f"{row} {share} is {real}" for row, share in lines_of(entry) if (real := results.real_size((row, share)))]
    return _label(entry) + (f" ({', '.join(other)})" if other else "")


def _label(entry: dict[str, Any]) -> str:
    if "label" in entry:
        return entry["label"]
    if "difference" in entry:
        text = f"{entry['difference'][0]} minus {entry['difference'][1]}"
    elif "measure" in entry:
        text = f"{entry['measure']} of {entry['of']}"
    else:
        text = entry.get("score") or entry["bench"]
    text += f" over {_label(entry['over'])}" if "over" in entry else ""
    return text + (f" minus {_label(entry['minus'])}" if "minus" in entry else "")
