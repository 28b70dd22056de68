"""The claims ledger: results/paper/claims.yaml against the records. A verdict is computed here and nowhere else.

A claim is the conjunction of its parts. It is supported if every part holds (intersection-union: the largest p counts),
contradicted if some part fails (Bonferroni over the parts), each by t-tests over seeds, two-sided, Holm over all claims
of a family that have a test on the scale, run or not; inconclusive otherwise; and not run while any planned run of it
has no record.
"""

from collections.abc import Mapping
from typing import Any

from meft_bench.report.claims.entries import Claim, Discrepancy, Finding, Ledger, Part, Shown
from meft_bench.report.claims.file import BOUNDS, SCALES
from meft_bench.report.claims.labels import label_of, lines_of, words_of
from meft_bench.report.records import quantities as q
from meft_bench.report.records.frontier import forgets_at_equal_score
from meft_bench.report.records.results import Results
from meft_bench.report.records.stats import holm, p_above, power, spread

COMMANDS = {
    "small": "make replicate SUITE=full",
    "bench": "make bench",
    "frontier": "make replicate SUITE=frontier",
    "pretrained": "make replicate SUITE=smollm2 DATA=DIR",
    "scale": "make replicate SUITE=paper MODEL=DIR DATA=DIR",
}
NEEDS = {
    "small": "the runs of the full suite",
    "bench": "the benchmarks",
    "frontier": "the runs of the suite frontier",
    "pretrained": "the runs of the suite on SmolLM2-135M",
    "scale": "a CUDA GPU, the weights of LLaMA-7B and the four data sets",
}


REACHABLE = {
    "small": "measured, on any machine (a CPU is enough)",
    "frontier": "measured, on any machine (a CPU is enough)",
    "pretrained": "measured, on any machine (hours on a CPU)",
    "bench": "measured, on any machine; without a GPU a transfer is a copy within one memory",
    "scale": "measured on a CUDA GPU that holds the model; capped where a larger card stands in for one of 24 GB",
}
"""The best evidence that each kind of test can have, and where. A formula or a cost model gives simulated at best, and
no verdict."""


_FRONTIER = "frontier"


def judge(
    book: dict[str, Any],
    small: Results,
    scale: Results,
    bench: Mapping[str, Any],
    pretrained: Results | None = None,
    frontier: Results | None = None,
) -> Ledger:
    """Every claim of load_claims against the records of the embedded suite, of the paper's suite, of the suite on a
    pretrained model, of the frontier on the embedded model (None where there is none), and the benchmarks (file stem ->
    content)."""
    bench = {**bench, _FRONTIER: frontier or Results([], {})}
    results = {"small": small, "pretrained": pretrained or Results([], {}), "scale": scale}
    parts = {
        (entry["id"], where): tuple(_part(part, results[where], bench, book["rules"]) for part in entry[where])
        for entry in book["claims"]
        for where in SCALES
        if where in entry
    }
    families = {entry["id"]: entry["family"] for entry in book["claims"]}
    raw = {key: p for key, found in parts.items() if (p := _p_values(found)) is not None}
    adjusted: dict[Any, float] = {}
    for family in {(families[name], where) for name, where in raw}:
        # Whoever has no p yet counts as 1: a verdict must not hang on which runs of a suite were made first.
        members = {
            key: min(1.0, 2 * min(raw[key])) if key in raw else 1.0
            for key in parts
            if (families[key[0]], key[1]) == family
        }
        adjusted |= holm(members)
    claims = []
    for entry in book["claims"]:
        findings = {
            where: _finding(
                parts[entry["id"], where],
                raw.get((entry["id"], where)),
                adjusted.get((entry["id"], where)),
                where,
                entry,
                book["rules"],
            )
            for where in SCALES
            if where in entry
        }
        claims.append(
            Claim(
                **{k: entry.get(k) for k in ("id", "where", "family", "says", "paper")},
                note=entry.get("note", ""),
                because=entry.get("because", ""),
                small=findings.get("small"),
                pretrained=findings.get("pretrained"),
                scale=findings.get("scale"),
                shows=_shown(entry, small, bench),
                lines=lines_of(*entry.get("small", ()), *entry.get("shows", ())),
            )
        )
    discrepancies = tuple(
        Discrepancy(
            **{k: d[k] for k in ("what", "paper", "code", "default")},
            unshown=d.get("unshown", ""),
            shows=_shown(d, small, bench),
        )
        for d in book["discrepancies"]
    )
    return Ledger(book["rules"], book["families"], tuple(claims), discrepancies)


# ---- parts ----


def _part(entry: dict[str, Any], results: Results, bench: Mapping[str, Any], rules: dict[str, Any]) -> Part:
    bound = next(b for b in BOUNDS if b in entry)
    limits = tuple(float(x) for x in (entry[bound] if bound == "within" else [entry[bound]]))
    values = _quantity(entry, results, bench)
    made: dict[str, Any] = {"values": values, "bound": bound, "limits": limits}
    made |= {"label": label_of(entry, results), "words": words_of(entry, results)}
    exact = bool(entry.get("exact"))
    if values.not_run:
        return Part(**made, verdict="not run", exact=exact)
    seeds = list(values.by_seed.values())
    if exact and seeds and not values.missing:
        holds = all(_within(v, bound, limits) for v in seeds)
        p = (0.0, 1.0) if holds else (1.0, 0.0)
        return Part(**made, verdict="holds" if holds else "fails", p_holds=p[0], p_fails=p[1], exact=True)
    # A run that diverged or ran out of memory is a result, but not one that a mean can be taken over.
    if values.missing or len(seeds) < rules["seeds"]:
        return Part(**made, verdict="open")
    low = p_above(seeds, limits[0]) if bound != "below" else 0.0
    high = p_above([-v for v in seeds], -limits[-1]) if bound != "above" else 0.0
    too_low = p_above([-v for v in seeds], -limits[0]) if bound != "below" else 1.0
    too_high = p_above(seeds, limits[-1]) if bound != "above" else 1.0
    p_holds, p_fails = max(low, high), min(too_low, too_high)
    half = rules["alpha"] / 2
    verdict = "holds" if p_holds < half else "fails" if p_fails < half else "open"
    return Part(**made, verdict=verdict, p_holds=p_holds, p_fails=p_fails)


def _within(value: float, bound: str, limits: tuple[float, ...]) -> bool:
    return (bound == "below" or value > limits[0]) and (bound == "above" or value < limits[-1])


def _quantity(entry: dict[str, Any], results: Results, bench: Mapping[str, Any]) -> q.Values:
    extra = {k: entry[k] for k in ("split", "metric") if k in entry}
    if "difference" in entry:
        own = _own(results, bench, *entry["difference"])
        values = q.difference(own, *entry["difference"], **extra)
    elif "score" in entry:
        values = q.score(results, entry["score"], **extra)
    elif "measure" in entry:
        values = q.measure(_own(results, bench, entry["of"]), entry["measure"], entry["of"])
    elif "frontier" in entry:
        values = forgets_at_equal_score(bench[_FRONTIER], *entry["frontier"])
    else:
        values = _benchmark(entry["bench"], bench)
    if "over" in entry:
        values = q.ratio(values, _quantity(entry["over"], results, bench))
    if "minus" in entry:
        values = q.minus(values, _quantity(entry["minus"], results, bench))
    return values


def _own(results: Results, bench: Mapping[str, Any], *references: str) -> Any:
    """Where these places are read: one of the frontier alone there, and with it what it is compared with."""
    here = all(q.parse_reference(reference) in results.places for reference in references)
    return results if here else bench.get(_FRONTIER, results)


def _benchmark(name: str, bench: Mapping[str, Any]) -> q.Values:
    """A field of a benchmark's file, FILE.FIELD or FILE.BLOCK.FIELD; its repeats stand where seeds would."""
    stem, *fields = name.split(".")
    found: Any = bench.get(stem)
    for field in fields:
        if not isinstance(found, Mapping) or field not in found:
            return q.Values({}, f"{name}: no benchmark")
        found = found[field]
    repeats = found if isinstance(found, list) else [found]
    values = {i: float(x) for i, x in enumerate(repeats)}
    return q.Values(values, stale=bool(bench[stem].get("why_not")), evidence=bench[stem]["evidence"])


def _shown(entry: dict[str, Any], results: Results, bench: Mapping[str, Any]) -> tuple[Shown, ...]:
    return tuple(
        Shown(label=label_of(s, results), words=words_of(s, results), values=_quantity(s, results, bench))
        for s in entry.get("shows", ())
    )


# ---- verdicts ----


def _p_values(parts: tuple[Part, ...]) -> tuple[float, float] | None:
    """(p that supports, p that contradicts) of a claim, one-sided; None when some part has neither."""
    holds = [p.p_holds for p in parts if p.p_holds is not None]
    fails = [p.p_fails for p in parts if p.p_fails is not None]
    if len(holds) < len(parts) or not parts:
        return None
    return max(holds), min(1.0, len(parts) * min(fails))


def _finding(
    parts: tuple[Part, ...],
    p: tuple[float, float] | None,
    p_holm: float | None,
    where: str,
    entry: dict[str, Any],
    rules: dict[str, Any],
) -> Finding:
    source = next((kind for kind in ("bench", _FRONTIER) if any(kind in part for part in entry[where])), where)
    made: dict[str, Any] = {"parts": parts, "command": COMMANDS[source], "needs": NEEDS[source]}
    made["reachable"] = REACHABLE[source]
    lacking = [part for part in parts if part.verdict == "not run"]
    if lacking:
        missing = list(dict.fromkeys(m for part in lacking for m in part.values.missing))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return Finding(verdict="not run", reason=f"{missing[0]}{more}", **made)
    if p is None or p_holm is None:
        open_part = next(part for part in parts if part.p_holds is None)
        count = len(open_part.values.by_seed)
        why = "; ".join(open_part.values.missing) or f"{count} of {rules['seeds']} seeds"
        return Finding(verdict="inconclusive", reason=why, decisive=open_part, **made)
    supports, contradicts = p
    weakest = max(parts, key=lambda part: part.p_holds if part.p_holds is not None else 0.0)
    clearest = min(parts, key=lambda part: part.p_fails if part.p_fails is not None else 1.0)
    decisive = weakest if supports <= contradicts else clearest
    made |= {"decisive": decisive, "p": min(1.0, 2 * min(p)), "p_holm": p_holm, "power": _power(decisive, entry)}
    if p_holm < rules["alpha"]:
        verdict = "supported" if supports <= contradicts else "contradicted"
        return Finding(verdict=verdict, reason=f"{decisive.label}: {decisive.condition}", **made)
    if made["p"] < rules["alpha"]:
        leaning = "supported" if supports <= contradicts else "contradicted"
        return Finding(verdict="inconclusive", reason=f"{leaning} by itself, not after Holm over its family", **made)
    if decisive.verdict == "fails":
        why = f"this part fails by itself, not after the correction for the {len(parts)} parts of the claim"
        return Finding(verdict="inconclusive", reason=why, **made)
    return Finding(verdict="inconclusive", reason="the intervals over seeds reach across the bound", **made)


def _power(part: Part, entry: dict[str, Any]) -> float | None:
    values = list(part.values.by_seed.values())
    sd = spread(values)
    if entry.get("paper") is None or part.values.items is None or sd is None:
        return None
    return power(min(abs(entry["paper"] - limit) for limit in part.limits), sd, len(values))
