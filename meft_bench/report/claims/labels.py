"""What a quantity of claims.yaml is called, in the file and in plain words, and which lines of the suite it reads."""

from typing import Any

from meft_bench.report.records.quantities import parse_reference
from meft_bench.report.records.results import Line, Results, title

MEASURES = {
    "union_share": "share of the neurons that a micro-batch needs (U/R)",
    "beta": "neurons moved for each that a token keeps (U/K)",
    "kept_share": "share of the neurons that a token keeps (K/R)",
    "in_units_of_m": "rows, gradients and hidden states moved by a micro-batch, in units of the adapter's size M",
    "bytes_in_m_per_step": "rows, gradients and hidden states moved by a step, in units of the adapter's size M",
    "bytes_per_step": "bytes moved by an optimizer step",
    "formula_gap": "bytes of a step beside the formula's",
    "eq8_in_m": "Equation 8 as printed, in units of the adapter's size M",
    "tokens_per_s": "tokens trained a second",
    "device_bytes": "bytes held on the device",
    "device_peak_gib": "peak of device memory in training, GiB",
    "train_hours": "hours of training",
    "active_share": "share of the neurons that a token activates",
    "top5_share": "share of a token's activation in its most active 5 % of neurons",
    "base_nats": "loss on the base model's own text, nats per token",
    "own_text_nats": "loss on text that the base writes, above the base's, nats per token",
    "held_out_kl": "divergence from the base on other text, nats per token (Kullback-Leibler)",
    "background_overlap": "how alike new facts and background text use the neurons, 1 is alike",
    "dead_share": "share of the neurons that no token keeps",
    "expert_entropy": "evenness of the use of experts, 1 is even",
    "lookahead_recall": "share of the kept neurons found one layer ahead",
    "reading_gap": "score gained by reading the model the other way",
    "grid_share": "share of the neurons that a micro-batch needs (U/R)",
    "grid_rise": "rise of U/R from the fewest to the most sequences probed, at one length",
    "bits_recalled": "bits of the taught facts that come back",
    "bits_per_parameter": "bits recalled for each trainable parameter",
    "retrieval_share": "dot products to find a token's neurons, over their number",
}
"""Measure -> its name for a reader."""

_SPLITS = {"recall": ", asked again as it was taught", "validation": ", development split"}
"""Where a score is not of the test's questions."""


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
    asked = f" ({entry['split']})" if entry.get("split", "test") != "test" else ""
    return _label(entry) + asked + (f" ({', '.join(other)})" if other else "")


def _label(entry: dict[str, Any]) -> str:
    if "label" in entry:
        return entry["label"]
    if "difference" in entry:
        text = f"{entry['difference'][0]} minus {entry['difference'][1]}"
    elif "measure" in entry:
        text = f"{entry['measure']} of {entry['of']}"
    elif "frontier" in entry:
        text = f"forgetting at equal score, {entry['frontier'][0]} over {entry['frontier'][1]}"
    else:
        text = entry.get("score") or entry["bench"]
    text += f" over {_label(entry['over'])}" if "over" in entry else ""
    return text + (f" minus {_label(entry['minus'])}" if "minus" in entry else "")


def words_of(entry: dict[str, Any], results: Results) -> str:
    """The quantity in plain words: "MEFT at 10% minus Parallel Adapter at 2%, on facts"."""
    if "label" in entry:
        return str(entry["label"])
    if "difference" in entry:
        (first, on), (second, other) = (_place(reference, results) for reference in entry["difference"])
        text = f"{first} minus {second}, {on}" if on == other else f"{first} {on} minus {second} {other}"
        text += _SPLITS.get(entry.get("split", "test"), "")
    elif "frontier" in entry:
        text = "forgetting at equal score, times that of the second: " + " against ".join(
            map(_curve, entry["frontier"])
        )
    elif "bench" in entry:
        text = f"benchmark {entry['bench'].replace('.', ': ').replace('_', ' ')}"
    else:
        text = f"{MEASURES[entry['measure']] if 'measure' in entry else 'score'}: "
        text += " ".join(_place(str(entry.get("of") or entry["score"]), results))
    text += f" over {words_of(entry['over'], results)}" if "over" in entry else ""
    return text + (f" minus {words_of(entry['minus'], results)}" if "minus" in entry else "")


def _curve(place: str) -> str:
    """Of quantities.points: "MEFT at 10%, every rate"."""
    rows, share, _ = place.split()
    return f"{' or '.join(title(row) for row in rows.split(','))} at {share}, every rate"


def _place(reference: str, results: Results) -> tuple[str, str]:
    """("MEFT at 40% (38.3%)", "on facts"): the method with its size, and the task with its variant."""
    row, share, task, variant = parse_reference(reference)
    return f"{title(row)} at {results.size((row, share))}", f"on {task}" + (f" ({variant})" if variant else "")
