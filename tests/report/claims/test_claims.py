"""Every claim of the ledger, true, false and undecidable: the verdict must follow. No number here was measured."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from meft_bench.harness import frontier, smollm2, suites
from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import Cell
from meft_bench.report.claims import labels
from meft_bench.report.claims.entries import Claim, Finding
from meft_bench.report.claims.file import BOUNDS, load_claims
from meft_bench.report.claims.ledger import SCALES, judge
from meft_bench.report.claims.words import counts, counts_sentence
from meft_bench.report.page.page import page
from meft_bench.report.records import quantities as q
from meft_bench.report.records.results import Record
from meft_bench.report.tables.claims import claims_table

from ..made_records import broken, make_record, results_of

BOOK = load_claims(PACKAGE.parent / "results" / "paper" / "claims.yaml")
CELLS = {
    "small": suites.full(),
    "pretrained": smollm2.cells("local/smollm2-135m@000000000000", "local@000000000000"),
    "scale": suites.paper("llama-7b", "hub", "cuda"),
}
CURVES = frontier.cells()
TESTED = [(entry, where) for entry in BOOK["claims"] for where in SCALES if where in entry]
NAMES = [f"{entry['id']}-{where}" for entry, where in TESTED]
N = 100
JITTER = (-1, 0, 1, 1, -1)
"""By seed: mean 0 over the first three and over all five."""
Part = dict[str, Any]


def _place(reference: str) -> tuple[str, str, str, str]:
    return q.parse_reference(reference)


def _references(part: Part) -> list[str]:
    own = [*part.get("difference", ()), *(part[k] for k in ("score", "of") if k in part)]
    return own + [r for k in ("over", "minus") if k in part for r in _references(part[k])]


def _cells(where: str, *references: str) -> list[Cell]:
    wanted = {_place(r) for r in references}
    return [c for c in CELLS[where] if (c.row, c.share, c.spec.task, c.variant) in wanted]


def _curve(place: str) -> list[Cell]:
    """Every run of a frontier's place."""
    rows, share, _ = place.split()
    return [c for c in CURVES if c.row in rows.split(",") and c.share == share and c.variant]


def _needed(world: "World", cell: Cell) -> bool:
    """True if some part has this place, and all its other places have this seed too."""
    if world.on_curves:  # the base is the same for every seed, and so is one of its runs
        return cell.row != "base"
    place = (cell.row, cell.share, cell.spec.task, cell.variant)
    for part in world.parts:
        places = [_place(r) for r in _references(part)]
        seeds = [{c.spec.seed for c in world.cells if (c.row, c.share, c.spec.task, c.variant) == p} for p in places]
        if place in places and cell.spec.seed in set.intersection(*seeds):
            return True
    return False


def _target(part: Part, kind: str, seed: int) -> float:
    """A value of the part on a seed that makes it true, false or undecidable."""
    bound = next(b for b in BOUNDS if b in part)
    low, high = part[bound] if bound == "within" else (part[bound], part[bound])
    wide = max(0.1, abs(high) / 2)
    if part.get("exact"):
        return {"above": low + wide, "below": high - wide, "within": (low + high) / 2}[bound] if kind != "false" else (
            low - wide if bound == "above" else high + wide
        )  # fmt: skip
    if kind == "undecidable":
        return high + wide * JITTER[seed]
    aim = {
        "true": {"above": low + wide, "below": high - wide, "within": (low + high) / 2},
        "false": {"above": low - wide, "below": high + wide, "within": high + 2 * wide},
    }[kind][bound]
    return aim + 0.01 * JITTER[seed]


class World:
    """Records, readings and benchmarks in which a claim has the wished truth."""

    def __init__(self, entry: dict[str, Any], where: str, kind: str) -> None:
        self.entry, self.where = entry, where
        self.parts: list[Part] = entry[where]
        self.cells = _cells(where, *(r for part in self.parts for r in _references(part)))
        self.on_curves = any("frontier" in part for part in self.parts)
        if self.on_curves:
            places = [place for part in self.parts for place in part["frontier"]]
            self.cells = [c for c in CURVES if c.row == "base"] + [c for place in places for c in _curve(place)]
        self.scores: dict[tuple[Any, int], float] = {}
        self.readings: dict[tuple[str, str], float] = {}
        self.bench: dict[str, Any] = {}
        for part in self.parts:
            self._set(part, kind)
        self.records = [self._record(c) for c in self.cells]

    def _set(self, part: Part, kind: str) -> None:
        if "bench" in part:
            stem, field = part["bench"].split(".")
            block = self.bench.setdefault(stem, {"evidence": "measured"})
            exact = part.get("exact")
            block[field] = _target(part, kind, 0) if exact else [_target(part, kind, s) for s in range(3)]
        elif "frontier" in part:
            first, second = part["frontier"]
            for cell in self.cells:
                own, seed = [c.spec.run_key for c in _curve(first)], cell.spec.seed
                ratio = _target(part, kind, seed) if cell.spec.run_key in own else float(cell.row != "base")
                self.readings["base_nats", cell.spec.run_key] = 1.0 + ratio
        elif "difference" in part:
            for seed in range(len(JITTER)):
                first, second = ((_place(r), seed) for r in part["difference"])
                gap = _target(part, kind, seed)
                if first in self.scores:  # a chain of parts shares its places
                    self.scores[second] = self.scores[first] - gap
                else:
                    self.scores[first] = self.scores.setdefault(second, 0.5) + gap
        else:
            for cell in _cells(self.where, part["of"]):
                self.readings[part["measure"], cell.spec.run_key] = _target(part, kind, cell.spec.seed)
            for cell in _cells(self.where, part["over"]["of"]) if "over" in part else ():
                self.readings[part["over"]["measure"], cell.spec.run_key] = 1.0

    def _record(self, cell: Cell) -> Record:
        place = (cell.row, cell.share, cell.spec.task, cell.variant)
        return make_record(cell, right=round(N * self.scores.get((place, cell.spec.seed), 0.5)), n=N)

    def judge(self, records: list[Record] | None = None, cells: list[Cell] | None = None) -> Finding:
        """The finding on this world's scale, the claim alone in its family."""
        here = results_of(self.cells if cells is None else cells, self.records if records is None else records)
        nothing = results_of([], [])
        alone = {**BOOK, "claims": [{k: v for k, v in self.entry.items() if k != "shows"}], "discrepancies": []}
        results = {where: here if where == self.where else nothing for where in SCALES}
        curves = here if self.on_curves else None
        claim = judge(alone, results["small"], results["scale"], self.bench, results["pretrained"], curves).claims[0]
        finding = getattr(claim, self.where)
        assert finding is not None
        return finding


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str], float]]:
    """Measures read this table (measure, run key) instead of the record; bootstrap intervals are left out."""
    table: dict[tuple[str, str], float] = {}
    for name in list(q.MEASURES):
        monkeypatch.setitem(q.MEASURES, name, lambda record, name=name: table[name, record["run_key"]])

    def no_items(*_: Any) -> None:
        raise ValueError("not needed here")

    monkeypatch.setattr(q, "compare", no_items)
    yield table


# ---- every claim ----


@pytest.mark.parametrize(("entry", "where"), TESTED, ids=NAMES)
def test_true_false_and_undecidable(entry: Any, where: str, reading: dict[tuple[str, str], float]) -> None:
    for kind, verdict in (("true", "supported"), ("false", "contradicted"), ("undecidable", "inconclusive")):
        world = World(entry, where, kind)
        reading |= world.readings
        if kind == "undecidable" and all(p.get("exact") for p in world.parts):
            continue  # counts have no spread; a lost run is the test below
        finding = world.judge()
        assert finding.verdict == verdict, f"{kind}: {finding.reason}"
        assert finding.decisive is not None and finding.p is not None and finding.p_holm == finding.p
        assert (finding.p_holm < BOOK["rules"]["alpha"]) == (kind != "undecidable")


@pytest.mark.parametrize(("entry", "where"), TESTED, ids=NAMES)
def test_one_record_short_is_not_run(entry: Any, where: str, reading: dict[tuple[str, str], float]) -> None:
    world = World(entry, where, "true")
    reading |= world.readings
    for i, cell in enumerate(world.cells):
        if not _needed(world, cell):
            continue
        finding = world.judge(world.records[:i] + world.records[i + 1 :])
        assert finding.verdict == "not run", f"without {cell.row} {cell.share}, seed {cell.spec.seed}"
        assert "no record" in finding.reason and finding.p is None and finding.command and finding.needs
    if world.bench:
        world.bench = {}
        assert world.judge().verdict == "not run"


@pytest.mark.parametrize(("entry", "where"), TESTED, ids=NAMES)
def test_a_run_that_diverged_decides_nothing(entry: Any, where: str, reading: dict[tuple[str, str], float]) -> None:
    world = World(entry, where, "true")
    reading |= world.readings
    if not world.records or world.on_curves:
        pytest.skip("a benchmark, no run; or one rate of several, which decide without it")
    finding = world.judge([broken(world.records[0], "diverged", "loss is nan"), *world.records[1:]])
    assert finding.verdict == "inconclusive" and "diverged" in finding.reason


@pytest.mark.parametrize(("entry", "where"), TESTED, ids=NAMES)
def test_two_seeds_decide_nothing(entry: Any, where: str, reading: dict[tuple[str, str], float]) -> None:
    world = World(entry, where, "true")
    reading |= world.readings
    two = [i for i, c in enumerate(world.cells) if c.spec.seed < 2]
    world.bench = {stem: {f: v[:2] if isinstance(v, list) else v for f, v in b.items()} for stem, b in
                   world.bench.items()}  # fmt: skip
    finding = world.judge([world.records[i] for i in two], [world.cells[i] for i in two])
    if all(p.get("exact") for p in world.parts):
        assert finding.verdict == "supported", "a count needs no second seed"
    else:
        assert (finding.verdict, finding.reason) == ("inconclusive", "2 of 3 seeds")


def test_every_reference_stands_in_its_suite() -> None:
    have = {where: {(c.row, c.share, c.spec.task, c.variant) for c in CELLS[where]} for where in SCALES}
    have["small"] |= {(c.row, c.share, c.spec.task, c.variant) for c in CURVES}
    for entry in [*BOOK["claims"], *BOOK["discrepancies"]]:
        for block, where in (*((w, w) for w in SCALES), ("shows", "small")):
            for reference in (r for part in entry.get(block, ()) for r in _references(part)):
                assert _place(reference) in have[where], f"{entry.get('id', entry.get('what'))}: {reference}"


def test_every_measure_has_a_name_for_a_reader_and_a_part_is_told_in_plain_words() -> None:
    assert set(labels.MEASURES) == set(q.MEASURES)
    small, nothing = results_of(CELLS["small"], []), results_of(CELLS["scale"], [])
    told = {c.id: c.small for c in judge(BOOK, small, nothing, {}).claims if c.small is not None}
    assert [p.words for p in told["t1-best-24g-nq"].parts][-1] == "MEFT at 10% minus Parallel Adapter at 2%, on facts"
    assert [p.label for p in told["t1-best-24g-nq"].parts][-1] == "meft 10% facts minus parallel_adapter 2% facts"
    every = [p.words for f in told.values() for p in f.parts]
    assert not [w for w in every if "_" in w], "no name of a program's"


# ---- the rules ----

MEFT = "meft 10% facts"


def _made(claims: list[dict[str, Any]], values: dict[str, tuple[float, ...]], **rules: Any) -> tuple[Claim, ...]:
    """Claims on measures that read these values, by seed."""
    cells = [c for c in _cells("small", MEFT) if c.spec.seed < 3]
    common = {"where": "here", "family": "table1", "says": "so"}
    book = {**BOOK, "rules": BOOK["rules"] | rules, "claims": [common | c for c in claims], "discrepancies": []}
    for name, by_seed in values.items():
        q.MEASURES[name] = lambda record, by_seed=by_seed: by_seed[record["spec"]["seed"]]
    results = results_of(cells, [make_record(c) for c in cells])
    return judge(book, results, results_of([], []), {}).claims


def _small(claim: Claim) -> Finding:
    assert claim.small is not None
    return claim.small


def test_the_seeds_of_a_finding_are_those_of_the_part_that_its_effect_is_of(reading: Any) -> None:
    values = {"union_share": (2.3, 2.4, 2.5), "dead_share": (5.1, 5.2, 5.3)}
    parts = [{"measure": n, "of": MEFT, "above": 0.0} for n in values]
    finding = _small(_made([{"id": "x", "small": parts}], values)[0])
    few, many = finding.parts
    more = replace(many, values=replace(many.values, by_seed={**many.values.by_seed, 3: 5.2, 4: 5.3}))
    told = replace(finding, parts=(few, more), decisive=more)
    assert (told.seeds, replace(told, decisive=few).seeds, replace(told, decisive=None).seeds) == (5, 3, 3)


def test_holm_takes_a_verdict_back(reading: Any) -> None:
    values = {"union_share": (2.3, 3.3, 4.3), "dead_share": (2.4, 3.4, 4.4)}  # p 0.029 and 0.028 with two degrees
    claims = [{"id": n, "small": [{"measure": n, "of": MEFT, "above": 0.0}]} for n in values]
    alone = _made(claims[:1], values)
    assert _small(alone[0]).verdict == "supported"
    together = [_small(c) for c in _made(claims, values)]
    assert [f.verdict for f in together] == ["inconclusive"] * 2
    assert all(f.p is not None and f.p_holm is not None and f.p < 0.05 < f.p_holm for f in together)
    assert together[0].reason == "supported by itself, not after Holm over its family"
    late = [claims[0], {**claims[1], "small": [{"measure": "dead_share", "of": "lora 2% facts", "above": 0.0}]}]
    first, second = (_small(c) for c in _made(late, values))
    assert first.p is not None and first.p_holm == pytest.approx(2 * first.p), "what was not run yet counts too"
    assert (first.verdict, second.verdict) == ("inconclusive", "not run")
    claims[1]["family"] = "figure1"
    assert [_small(c).verdict for c in _made(claims, values)] == ["supported"] * 2, "families stand apart"


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [
        ({"above": 0.0}, "supported"),
        ({"above": 0.2}, "contradicted"),
        ({"above": 0.1}, "inconclusive"),
        ({"below": 0.2}, "supported"),
        ({"within": [0.0, 0.2]}, "supported"),
        ({"within": [-0.2, 0.0]}, "contradicted"),
        ({"within": [0.2, 0.3]}, "contradicted"),
        ({"within": [0.0, 0.1]}, "inconclusive"),
    ],
)
def test_the_margin_decides(reading: Any, bound: dict[str, Any], verdict: str) -> None:
    claims = [{"id": "x", "small": [{"measure": "union_share", "of": MEFT, **bound}]}]
    assert _small(_made(claims, {"union_share": (0.09, 0.1, 0.11)})[0]).verdict == verdict


def test_one_clear_failure_contradicts_and_one_open_part_leaves_open(reading: Any) -> None:
    good, bad, open_ = (0.9, 1.0, 1.1), (-1.01, -1.0, -0.99), (-1.0, 0.0, 1.0)
    parts = [{"measure": n, "of": MEFT, "above": 0.0} for n in ("union_share", "dead_share")]
    claim = [{"id": "x", "small": parts}]
    failed = _small(_made(claim, {"union_share": good, "dead_share": bad})[0])
    assert failed.verdict == "contradicted" and failed.decisive is failed.parts[1]
    assert failed.p == pytest.approx(4 * (failed.parts[1].p_fails or 0)), "two-sided, twice for two parts"
    left = _small(_made(claim, {"union_share": good, "dead_share": open_})[0])
    assert (left.verdict, [p.verdict for p in left.parts]) == ("inconclusive", ["holds", "open"])
    assert [p.verdict for p in failed.parts] == ["holds", "fails"]


def test_the_reason_of_an_undecided_claim_fits_its_part(reading: Any) -> None:
    """A part beyond its bound whose claim is not contradicted is told so, not that its interval reaches across."""
    names = ("union_share", "dead_share", "beta")
    parts = [{"measure": n, "of": MEFT, "above": 0.0} for n in names]
    values = {"union_share": (-2.3, -3.3, -4.3), "dead_share": (-1.0, 0.0, 1.0), "beta": (-1.0, 0.0, 1.0)}
    finding = _small(_made([{"id": "x", "small": parts}], values)[0])
    assert finding.verdict == "inconclusive" and finding.decisive is finding.parts[0]
    assert finding.parts[0].verdict == "fails" and "correction for the 3 parts" in finding.reason
    alone = _small(_made([{"id": "x", "small": parts[1:2]}], values)[0])
    assert alone.reason == "the intervals over seeds reach across the bound"


def test_the_rules_of_the_file_are_used(reading: Any) -> None:
    claims = [{"id": "x", "small": [{"measure": "union_share", "of": MEFT, "above": 0.0}]}]
    values = {"union_share": (2.3, 3.3, 4.3)}
    assert _small(_made(claims, values, alpha=0.01)[0]).verdict == "inconclusive"
    assert _small(_made(claims, values, seeds=4)[0]).reason == "3 of 4 seeds"


def test_values_without_spread_decide_by_themselves(reading: Any) -> None:
    claims = [{"id": "x", "small": [{"measure": "union_share", "of": MEFT, "above": 0.0}]}]
    same = _small(_made(claims, {"union_share": (1.0, 1.0, 1.0)})[0])
    assert same.verdict == "supported" and same.p == 0.0


# ---- the file ----


def _broken(change: Any) -> dict[str, Any]:
    book = deepcopy(BOOK)
    change(book)
    return book


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b["claims"][7]["small"][0].update({"difference": None, "measure": "luck"}), "one of difference"),
        (lambda b: b["claims"][14]["small"][0].update(measure="luck"), "unknown measure 'luck'"),
        (lambda b: b["claims"][0]["small"][0].pop("above"), "a part needs one of above, below, within, got 0"),
        (lambda b: b["claims"][0]["small"][0].update(below=1.0), "got 2"),
        (lambda b: b["claims"][0]["small"][0].update(above="much"), "above takes a number"),
        (lambda b: b["claims"][9]["small"][0].update(within=[0.1]), "within takes two numbers"),
        (lambda b: b["claims"][1].update(id=b["claims"][0]["id"]), "the id stands twice"),
        (lambda b: b["claims"][0]["small"][0].update(difference=["meft facts", "lora 2% facts"]), "no reference"),
        (lambda b: b["claims"][0]["small"][0].update(difference=["meft 10% facts"]), "of two places"),
        (lambda b: b["claims"][0].update(family="luck"), "unknown family 'luck'"),
        (lambda b: b["claims"][0].update(verdict="supported"), "unknown key verdict"),
        (lambda b: b["claims"][0].pop("says"), "lacks says"),
        (lambda b: [b["claims"][0].pop(w) for w in SCALES], "it has no test"),
        (lambda b: b["discrepancies"][0].pop("code"), "lacks code"),
        (lambda b: b["discrepancies"][0].pop("shows"), "give shows, or unshown"),
        (lambda b: b["discrepancies"][0].update(unshown="both"), "give shows, or unshown"),
        (lambda b: b.pop("families"), "needs rules, families"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, change: Any, said: str) -> None:
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(_broken(change)))
    with pytest.raises(ValueError, match="claims.yaml") as caught:
        load_claims(tmp_path / "claims.yaml")
    assert said in str(caught.value)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the claims claims.yaml"):
        load_claims(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text(":\n  - [")
    with pytest.raises(ValueError, match="claims.yaml is not YAML"):
        load_claims(tmp_path / "claims.yaml")


# ---- the ledger in short ----


def test_without_records_everything_is_not_run() -> None:
    ledger = judge(BOOK, results_of(CELLS["small"], []), results_of(CELLS["scale"], []), {})
    assert set(counts(ledger, "small")) == set(counts(ledger, "scale")) == {"not run", "no test"}
    said = "33 claims, 29 have a test on the embedded model (29 not run), 12 on SmolLM2-135M (12 not run), 30 at the"
    assert said in counts_sentence(ledger)
    table = claims_table(ledger)
    assert table.name == "claims" and len(table.csv.splitlines()) == 1 + len(BOOK["claims"])
    assert all(c["says"] in table.markdown for c in BOOK["claims"])


def test_the_short_forms_say_the_number_and_the_reason(reading: Any) -> None:
    entry = next(c for c in BOOK["claims"] if c["id"] == "t3-lora-ffn-flat")
    world = World(entry, "small", "false")
    results = results_of(world.cells, world.records)
    alone = {**BOOK, "claims": [entry], "discrepancies": []}
    ledger = judge(alone, results, results_of(CELLS["scale"], []), {})
    text, table = unescape(page(ledger, {}, {}, {}, {}).decode()), claims_table(ledger)
    assert 'On the embedded model <span class="badge contradicted">' in text
    assert f"Because {entry['because']}." in text
    assert "+0.250 [" in text and "3 seeds" in text and "within [-0.05, 0.05]" in text
    assert "| -0.004 | contradicted | +0.250 [" in table.markdown
    assert "not run; needs a CUDA GPU" in table.markdown


def test_the_page_says_why_a_claim_is_open(reading: Any) -> None:
    entry = next(c for c in BOOK["claims"] if c["id"] == "f1-parallel-adapter-grows")
    world = World(entry, "small", "undecidable")
    alone = {**BOOK, "claims": [entry], "discrepancies": []}
    ledger = judge(alone, results_of(world.cells, world.records), results_of(CELLS["scale"], []), {})
    assert "Inconclusive: the intervals over seeds reach across the bound." in page(ledger, {}, {}, {}, {}).decode()
