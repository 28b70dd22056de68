"""results/report.html: the whole report as one page. No script, no network, no other file; equal input, equal bytes."""

from collections.abc import Mapping
from html import escape

from meft_bench.report.claims.ledger import Discrepancy, Finding, Ledger
from meft_bench.report.claims.words import (
    SCALE_TITLES,
    borrowed_sentence,
    capitalised,
    counts_sentence,
    findings,
    stale_sentence,
)
from meft_bench.report.page.claims import (
    claim_anchor,
    claim_article,
    counts_table,
    evidence,
    overview_table,
    shown_table,
)
from meft_bench.report.page.markdown import html_table, inline, to_html
from meft_bench.report.page.parts import STYLE, inline_svg
from meft_bench.report.records import quantities as q
from meft_bench.report.text import Table

PAPER_URL = "https://arxiv.org/abs/2406.04984"
TITLE = "MEFT, replicated"
_SECTIONS = {
    "verdicts": "The verdicts",
    "claims": "Every claim",
    "tables": "Tables",
    "figures": "Figures",
    "profile": "What fits, how fast",
    "discrepancies": "Where the paper and its code differ",
    "not-run": "What was not run",
    "reading": "How to read this page",
}
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
    "real": "Real rows on a small real model",
    "suite_paper": "The paper's own sizes, LLaMA-7B",
    "suite_paper_mistral": "The paper's own sizes, Mistral-7B",
}
_EVIDENCE = {
    "measured": "run on the machine that the record describes",
    "capped": "measured on a larger card under a cap of its allocator",
    "simulated": "from a formula or a cost model, never from a run",
    "reported": "printed in the paper; never in the same column as ours",
    "not run": "with the reason, and what it needs",
}


def page(
    ledger: Ledger,
    tables: Mapping[str, Table],
    figures: Mapping[str, bytes],
    captions: Mapping[str, tuple[str, str]],
    facts: Mapping[str, str],
    profile: str = "",
    notes: Mapping[str, str] | None = None,
) -> bytes:
    """The page as UTF-8. figures: name -> SVG; captions: name -> (title, caption); facts: what the head says of the
    records; profile: the section on memory and speed, HTML; notes: claim id -> a remark without a verdict. Raises
    ValueError for Markdown or a drawing that the page cannot take."""
    shown = {name: table for name, table in tables.items() if name != "claims"}  # its linked form opens the page
    inside = {
        "verdicts": _verdicts(ledger),
        "claims": _claims(ledger, notes or {}),
        "tables": "".join(_table(name, table) for name, table in shown.items()) or "<p>No tables.</p>\n",
        "figures": "".join(_figure(n, *captions[n], figures.get(n)) for n in captions) or "<p>No figures.</p>\n",
        "profile": profile or "<p>Not run.</p>\n",
        "discrepancies": "".join(_discrepancy(i, d) for i, d in enumerate(ledger.discrepancies, 1)),
        "not-run": _not_run(ledger),
        "reading": _reading(ledger),
    }
    sections = "".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{inside[name]}'
        '<p class="top"><a href="#top">Back to the top</a></p>\n</section>\n'
        for name, title in _SECTIONS.items()
    )
    text = (
        '<!DOCTYPE html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body id="top">\n<header>\n<h1>{TITLE}: every claim, with its evidence</h1>\n{_intro()}{_facts(facts)}'
        f"</header>\n{_contents(ledger, shown, captions)}<main>\n{sections}</main>\n</body>\n</html>\n"
    )
    return text.encode()


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(k.capitalize())}</dt><dd>{escape(v)}</dd>\n" for k, v in facts.items())
    return f'<dl class="facts">\n{rows}</dl>\n' if facts else ""


def _contents(ledger: Ledger, tables: Mapping[str, Table], captions: Mapping[str, tuple[str, str]]) -> str:
    below = {
        "claims": [(f"family-{name}", capitalised(title)) for name, title in _families(ledger).items()],
        "tables": [(f"table-{name}", _table_title(name)) for name in tables],
        "figures": [(f"figure-{name}", title) for name, (title, _) in captions.items()],
    }
    lines = ""
    for name, title in _SECTIONS.items():
        inner = "".join(f'<li><a href="#{to}">{escape(text)}</a></li>\n' for to, text in below.get(name, ()))
        more = (
            f"\n<details><summary>{len(below[name])} parts</summary>\n<ul>\n{inner}</ul>\n</details>" if inner else ""
        )
        lines += f'<li><a href="#{name}">{escape(title)}</a>{more}</li>\n'
    return f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<ol>\n{lines}</ol>\n</nav>\n'


def _intro() -> str:
    return (
        f'<p>MEFT (<a href="{PAPER_URL}">arXiv 2406.04984</a>) fine-tunes a frozen language model with a very large '
        "sparse adapter whose neurons stay in host memory, and moves only those that a batch needs to the device. "
        "This page tests every quantitative claim of the paper, in our words, with runs of an open implementation "
        "against the usual baselines. A verdict on the embedded model is about the mechanism: it says whether what the "
        "paper describes happens at all, not what a model of 7B parameters would score.</p>\n"
    )


def _verdicts(ledger: Ledger) -> str:
    told = [s for s in (stale_sentence(ledger), counts_sentence(ledger), borrowed_sentence(ledger)) if s]
    return "".join(f"<p>{inline(s)}</p>\n" for s in told) + counts_table(ledger) + overview_table(ledger)


def _claims(ledger: Ledger, notes: Mapping[str, str]) -> str:
    text = ""
    for name, title in _families(ledger).items():
        text += f'<h3 id="family-{name}">{escape(capitalised(title))}</h3>\n'
        text += "".join(claim_article(c, notes.get(c.id, "")) for c in ledger.claims if c.family == name)
    return text


def _families(ledger: Ledger) -> dict[str, str]:
    """Those that have a claim."""
    used = {c.family for c in ledger.claims}
    return {name: title for name, title in ledger.families.items() if name in used}


def _table(name: str, table: Table) -> str:
    return f'<h3 id="table-{name}">{escape(_table_title(name))}</h3>\n{to_html(table.markdown)}'


def _table_title(name: str) -> str:
    return _TABLE_TITLES.get(name, name.replace("_", " ").capitalize())


def _figure(name: str, title: str, caption: str, svg: bytes | None) -> str:
    drawing = "<p>Not drawn.</p>\n" if svg is None else f'<div class="scroll">{inline_svg(name, svg, title)}</div>\n'
    return (
        f'<figure id="figure-{name}">\n{drawing}<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>\n'
        "</figure>\n"
    )


def _discrepancy(number: int, d: Discrepancy) -> str:
    said = {"Paper": d.paper, "Released code": d.code, "Our default": d.default}
    rows = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>\n" for k, v in said.items())
    effects = shown_table(d.shows) if d.shows else f'<p class="soft">No run compares them: {escape(d.unshown)}.</p>\n'
    head = f'<div class="difference">\n<h3>{number}. {escape(capitalised(d.what))}</h3>\n'
    return f'{head}<dl class="three">\n{rows}</dl>\n{effects}</div>\n'


def _not_run(ledger: Ledger) -> str:
    """Claims and quantities without records, by what they need; then what has no test at all."""
    by_need: dict[tuple[str, str], list[str]] = {}
    without: dict[str, list[str]] = {}
    for where, title in SCALE_TITLES.items():
        for claim, finding in findings(ledger, where):
            link = f'<a href="#{claim_anchor(claim)}">{escape(capitalised(claim.where))}</a>: {escape(claim.says)}'
            if finding is None:
                without.setdefault(title, []).append(link)
            elif finding.verdict == "not run":
                why = f' <span class="soft">({escape(finding.reason)})</span>'
                by_need.setdefault((finding.needs, finding.command), []).append(link + why)
    text = "".join(
        f"<h3>Needs {escape(needs)}</h3>\n<p>{len(found)} claims; <code>{escape(command)}</code></p>\n{_list(found)}"
        for (needs, command), found in by_need.items()
    )
    for title, found in without.items():
        text += f"<h3>No test {escape(title)}</h3>\n<p>{len(found)} claims have none.</p>\n"
        text += _list(found)
    beside = [s for c in ledger.claims for s in c.shows] + [s for d in ledger.discrepancies for s in d.shows]
    shown = [s for s in beside if s.values.missing]
    if shown:
        text += "<h3>Quantities shown beside, not complete</h3>\n"
        text += _list([f"{escape(s.label)}: {evidence(s)}" for s in shown])
    return text or "<p>Everything planned was run.</p>\n"


def _list(items: list[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>\n"


def _reading(ledger: Ledger) -> str:
    rules = ledger.rules
    return (
        "<h3>Evidence</h3>\n" + _definitions(_EVIDENCE) + "<h3>Verdicts</h3>\n"
        "<p>A claim holds if all its parts hold. A part is a quantity, read once per seed, and a bound that was fixed "
        "before the runs: above B, below B, or within A and B. Each part is tested by t-tests over seeds, paired by "
        "seed where two methods are compared. A count that has no spread is compared with its bound directly.</p>\n"
        "<ul>\n"
        f"<li>Fewer than {rules['seeds']} seeds give no verdict but inconclusive.</li>\n"
        "<li>Supported: every part holds; the largest p of the parts counts.</li>\n"
        "<li>Contradicted: some part fails, that is, lies beyond its bound on the other side; the smallest p counts, "
        "times the number of parts.</li>\n"
        f"<li>Both need a two-sided p below {rules['alpha']:g} after Holm's correction over the claims of a family "
        "that have one on the same scale.</li>\n"
        "<li>Inconclusive: neither is shown, or a run of it diverged or ran out of memory.</li>\n"
        "<li>Not run: a planned run has no record.</li>\n"
        "</ul>\n"
        "<p>Brackets in the columns over seeds are 95 % t-intervals over seeds. Over items stands the paired bootstrap "
        "over the test items of all seeds; n counts those pairs. No verdict uses it, and it is narrower where seeds "
        "differ more than items. The p beside a part is one-sided and not corrected. Power is that of a two-sided "
        "t-test against no effect with the spread over our seeds.</p>\n"
        "<h3>Families</h3>\n" + _families_table(ledger) + "<h3>Measures</h3>\n"
        "<p>R neurons per layer, K kept per token, U union over the tokens of a micro-batch, M trainable keys and "
        "values. A place is written as row, size, task, and a variant after a slash.</p>\n"
        + _definitions({name: " ".join((f.__doc__ or "").split()) for name, f in q.MEASURES.items()})
    )


def _families_table(ledger: Ledger) -> str:
    def tested(name: str, where: str) -> str:
        of_family: list[Finding | None] = [f for c, f in findings(ledger, where) if c.family == name]
        return str(sum(f is not None and f.p is not None for f in of_family))

    body = [
        [escape(title), *(tested(name, where) for where in SCALE_TITLES)] for name, title in ledger.families.items()
    ]
    header = ["Family", *(f"with a p, {title}" for title in SCALE_TITLES.values())]
    return html_table(header, body, [False] + [True] * len(SCALE_TITLES), "Families of claims")


def _definitions(terms: Mapping[str, str]) -> str:
    rows = "".join(f"<dt><code>{escape(k)}</code></dt><dd>{escape(v)}</dd>\n" for k, v in terms.items())
    return f'<dl class="three">\n{rows}</dl>\n'
