"""results/report.html: the whole report as one page. No script, no network, no other file; equal input, equal bytes.

Its templates stand beside this file: page.html, the claims' and the profile's parts, and what all are made of.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from meft_bench.report.claims import words
from meft_bench.report.claims.entries import VERDICTS, Claim, Ledger, Shown
from meft_bench.report.claims.labels import MEASURES
from meft_bench.report.page.images import embedded
from meft_bench.report.page.markdown import inline, to_html
from meft_bench.report.records import quantities as q
from meft_bench.report.records.results import STALE_HEAD, STALE_MARK, borrowed_rates
from meft_bench.report.text import Table

PAPER_URL = "https://arxiv.org/abs/2406.04984"
TITLE = "MEFT, replicated"
_SECTIONS = {
    "takeaways": "What to take away",
    "real": "On a real language model",
    "verdicts": "The verdicts",
    "claims": "Every claim",
    "tables": "Tables",
    "figures": "Figures",
    "profile": "What fits, how fast",
    "discrepancies": "Where the paper and its code differ",
    "not-run": "What was not run",
    "reading": "How to read this page",
}
_ON_REAL = ("smollm2", "smollm2_forgetting", "smollm2_union", "frontier_smollm2", "smollm2_sweep")
"""Tables of the section on the real model."""
_TABLE_TITLES = {
    "table1": "Table 1: ours",
    "table1_paper": "Table 1: what the paper reports, beside ours",
    "paper_tables": "The paper's Tables 2 and 3, and Mistral",
    "sizes": "Equal parameters, equal device bytes",
    "ablations": "One choice at a time",
    "neurons": "Experts and neurons in use",
    "union": "Share of neurons a micro-batch needs",
    "traffic": "Bytes moved and time per step",
    "sweep": "Learning rates tried",
    "neighbours": "The systems that the paper is listed with",
    "real": "Real rows on stories260K, a model of 0.26 million parameters",
    "frontier": "Knowledge against forgetting, over learning rates",
    "smollm2": "SmolLM2-135M: what was learnt",
    "smollm2_forgetting": "SmolLM2-135M: what was forgotten",
    "smollm2_union": "SmolLM2-135M: share of neurons a micro-batch needs",
    "smollm2_sweep": "SmolLM2-135M: learning rates tried",
    "frontier_smollm2": "SmolLM2-135M: knowledge against forgetting, over learning rates",
    "suite_paper": "The paper's own sizes, LLaMA-7B",
    "suite_paper_mistral": "The paper's own sizes, Mistral-7B",
}


def page(
    ledger: Ledger,
    tables: Mapping[str, Table],
    drawings: Mapping[str, bytes],
    captions: Mapping[str, tuple[str, str]],
    facts: Mapping[str, str],
    profile: str = "",
    notes: Mapping[str, str] | None = None,
    takeaways: str = "",
    about: str = "",
    on_real: Mapping[str, tuple[str, str]] | None = None,
) -> bytes:
    """The page as UTF-8. drawings: name -> PNG; captions: name -> (title, caption); facts: what is said of the
    records; profile: the section on memory and speed, HTML; notes: claim id -> a remark without a verdict; takeaways:
    what to take away, Markdown; about: which models were taught, Markdown; on_real: captions of the figures of the
    section on the real model. Raises ValueError for Markdown or a drawing that the page cannot take."""
    shown = {name: table for name, table in tables.items() if name != "claims"}  # its linked form opens the page
    used = {c.family for c in ledger.claims}
    families = {name: title for name, title in ledger.families.items() if name in used}
    stale = words.stale_sentence(ledger)
    told = (words.counts_sentence(ledger), words.borrowed_sentence(ledger))
    beside = [s for c in ledger.claims for s in c.shows] + [s for d in ledger.discrepancies for s in d.shows]
    on_real, elsewhere = on_real or {}, {n: t for n, t in shown.items() if n not in _ON_REAL}
    text = render(
        "page.html", ledger=ledger, families=families, notes=notes or {}, profile=Markup(profile),
        stale=Markup(inline(stale)), told=[Markup(inline(s)) for s in told],
        facts={k: v for k, v in facts.items() if not (k == "stale" and stale)},
        takeaways=Markup(to_html(_once(takeaways))),
        about=Markup(inline(about)),
        real_tables=[(n, table_title(n), body(shown[n])) for n in _ON_REAL if n in shown],
        real_figures=[figure(n, on_real[n], drawings) for n in on_real if n in drawings],
        tables=[(name, table_title(name), body(table)) for name, table in elsewhere.items()],
        figures=[figure(n, captions[n], drawings) for n in captions],
        below=_contents(families, elsewhere, captions), not_run=_not_run(ledger), without=_without_test(ledger),
        incomplete=[s for s in beside if s.values.missing],
    )  # fmt: skip
    return text.encode()


def body(table: Table) -> Markup:
    """A table with what is said of it, as HTML."""
    return Markup(to_html(_once(table.markdown)))


def figure(name: str, said: tuple[str, str], drawings: Mapping[str, bytes]) -> tuple[str, str, str, str]:
    """(name, title, caption, data URI); the last is "" where nothing was drawn."""
    return name, *said, embedded(name, drawings[name]) if name in drawings else ""


def table_title(name: str) -> str:
    """What a table is called on the page."""
    return _TABLE_TITLES.get(name, name.replace("_", " ").capitalize())


def evidence(shown: Shown) -> str:
    """How a quantity came to be, or what is missing of it."""
    missing = shown.values.missing
    label = shown.values.evidence.replace("-", " ")
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{label} ({missing[0]}{more})" if missing else label


def _once(markdown: str) -> str:
    """Without the paragraph on runs of older code, which the page says once for all."""
    return "\n\n".join(p for p in markdown.split("\n\n") if not p.startswith(STALE_HEAD))


def _contents(
    families: Mapping[str, str], tables: Mapping[str, Table], captions: Mapping[str, tuple[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    """Section -> (anchor, title) of its parts."""
    return {
        "claims": [(f"family-{name}", words.capitalised(title)) for name, title in families.items()],
        "tables": [(f"table-{name}", table_title(name)) for name in tables],
        "figures": [(f"figure-{name}", title) for name, (title, _) in captions.items()],
    }


def _not_run(ledger: Ledger) -> dict[tuple[str, str], list[tuple[Claim, str]]]:
    """(what it needs, command) -> claims without records, each with its reason."""
    found: dict[tuple[str, str], list[tuple[Claim, str]]] = {}
    for where in words.SCALE_TITLES:
        for claim, finding in words.findings(ledger, where):
            if finding is not None and finding.verdict == "not run":
                found.setdefault((finding.needs, finding.command), []).append((claim, finding.reason))
    return found


def _without_test(ledger: Ledger) -> dict[str, list[Claim]]:
    """Scale in words -> claims that it cannot decide."""
    return {t: [c for c, f in words.findings(ledger, w) if f is None] for w, t in words.SCALE_TITLES.items()}


def _tested(ledger: Ledger, family: str, where: str) -> int:
    found = [f for c, f in words.findings(ledger, where) if c.family == family]
    return sum(f is not None and f.p is not None for f in found)


def _run_keys(claim: Claim) -> list[str]:
    of_findings = {k for f in words.findings_of(claim) if f is not None for k in f.run_keys}
    return sorted(of_findings | {k for s in claim.shows for k in s.values.run_keys})


def _equals(p: float) -> str:
    text = words.p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _environment() -> Environment:
    here = Path(__file__).parent
    made = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"capitalised": words.capitalised, "with_a_p": lambda title: f"with a p, {title}"}
    made.globals |= {
        f.__name__: f
        for f in (words.effect, words.numbers, words.condition, words.seeds_text, words.is_exact, words.verdict_of,
                  words.paper_effect, words.counts, borrowed_rates, evidence)
    }  # fmt: skip
    made.globals |= {
        "equals": _equals, "tested": _tested, "run_keys": _run_keys, "sections": _SECTIONS, "title": TITLE,
        "paper_url": PAPER_URL, "stale_mark": STALE_MARK, "scales": words.SCALE_TITLES,
        "verdicts": (*VERDICTS, words.NO_TEST), "style": Markup((here / "style.css").read_text(encoding="utf-8")),
        "measures": {words.capitalised(name): " ".join((q.MEASURES[key].__doc__ or "").split())
                     for key, name in MEASURES.items()},
    }  # fmt: skip
    return made


_ENVIRONMENT = _environment()


def render(template: str, **given: Any) -> str:
    """A template of this folder with what it is given; text is escaped, Markup is not."""
    return _ENVIRONMENT.get_template(template).render(given)


def badge(verdict: str) -> str:
    """A verdict as a word with a shape and a colour of its own."""
    return str(_ENVIRONMENT.get_template("parts.html").module.badge(verdict))  # type: ignore[attr-defined]
