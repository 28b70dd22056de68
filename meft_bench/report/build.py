"""The report: records in, verdicts, tables, figures, README blocks and report.html out. Equal records, equal bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.harness import frontier, smollm2, suites
from meft_bench.harness.numerics import bench_why_not
from meft_bench.harness.record import EVIDENCE
from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import Cell
from meft_bench.reading import read_json
from meft_bench.report.blocks import blocks as readme_blocks
from meft_bench.report.claims.entries import Ledger
from meft_bench.report.claims.file import load_claims
from meft_bench.report.claims.ledger import judge
from meft_bench.report.claims.takeaways import takeaways
from meft_bench.report.figures import bases, catalogue, gained
from meft_bench.report.figures import frontier as curves_figure
from meft_bench.report.page import page as html
from meft_bench.report.page.profile import ProfileReport, profile_report, section
from meft_bench.report.readme import check_readme, update_readme
from meft_bench.report.records import real as on_real
from meft_bench.report.records.evidence import listed
from meft_bench.report.records.paper import load_reported
from meft_bench.report.records.results import Record, Results
from meft_bench.report.tables import facts as more_tables
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.claims import claims_table
from meft_bench.report.tables.frontier import frontier_table
from meft_bench.report.tables.neighbours import neighbours_table
from meft_bench.report.tables.pretrained import not_run, pretrained
from meft_bench.report.tables.scale import page_blocks
from meft_bench.report.tables.traffic import traffic_table
from meft_bench.report.text import Table, one_line, plain, visible
from meft_bench.write import write_if_changed

MAIN_SUITES = ("full", "smoke")
"""The first of these that is given fills every table and figure."""


@dataclass(frozen=True)
class Report:
    """Everything that is rendered, before any of it is written."""

    ledger: Ledger
    tables: dict[str, Table]
    blocks: dict[str, str]
    results: Results
    reported: dict[str, Any]
    bench: dict[str, Any]
    facts: dict[str, str]
    profile: ProfileReport
    parameters: dict[str, float]
    """Of the base of each scale."""
    curves: Results | None = None
    """Of the suite frontier."""
    real: Results | None = None
    """Of the suite on the real model."""
    real_curves: Results | None = None
    """Of the suite frontier on it."""

    def texts(self) -> dict[str, bytes]:
        """Name below the results folder -> content of every table."""
        made = [*self.tables.values(), *self.profile.tables.values()]
        return {f"tables/{n}": text.encode() for t in made for n, text in t.files().items()}


def build_report(
    suite_cells: Mapping[str, list[Cell]],
    records: Iterable[Record],
    results_dir: Path,
    readme: Path | None = None,
    set_aside: Sequence[str] = (),
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write results_dir/{tables,figures}/*, results_dir/report.html and the README's blocks; returns what changed.

    suite_cells: suite name -> its cells; needs full or smoke, takes real and paper. set_aside: what was wrong with each
    file that is no record and was left out; told at the top of the overview. formats: of figures (png, svg).
    Raises ValueError when the paper's numbers, the claims, the README's markers or the disk are not as they should be;
    nothing is written before the first three are checked.
    """
    report = _report(suite_cells, records, results_dir, set_aside)
    pages = _pages(readme, report)
    for page, blocks in pages.items():
        check_readme(page, blocks)
    drawn = catalogue.draw(report.results, report.reported, report.bench, formats=formats, curves=report.curves)
    drawn |= report.profile.draw(formats)
    drawn |= bases.draw(report.ledger, report.parameters, formats) | gained.draw(report.real, formats)
    drawn |= curves_figure.draw(report.real_curves, formats)
    drawings = {name.removesuffix(".png"): content for name, content in drawn.items() if name.endswith(".png")}
    files = {results_dir / name: content for name, content in report.texts().items()}
    files |= {results_dir / "figures" / name: content for name, content in drawn.items()}
    files[results_dir / "report.html"] = html.page(
        report.ledger, report.tables, drawings, catalogue.FIGURES, report.facts,
        profile=section(report.profile, drawings), notes=report.profile.notes,
        takeaways=takeaways(report.ledger, report.profile.profiles, report.real), about=report.blocks["about"],
        on_real={f.NAME: (f.TITLE, f.CAPTION) for f in (gained, curves_figure, bases)},
    )  # fmt: skip
    written = [path for path, content in sorted(files.items()) if write_if_changed(path, content)]
    return [*written, *(page for page, blocks in pages.items() if update_readme(page, blocks))]


def check_report(
    suite_cells: Mapping[str, list[Cell]],
    records: Iterable[Record],
    results_dir: Path,
    readme: Path | None = None,
    set_aside: Sequence[str] = (),
) -> list[str]:
    """Names of the tables and README blocks that are not what the records give; writes nothing.

    Figures, and the page that holds them, are left out: their bytes also depend on matplotlib's version.
    """
    report = _report(suite_cells, records, results_dir, set_aside)
    drifted = [name for name, content in sorted(report.texts().items()) if not _holds(results_dir / name, content)]
    for page, blocks in _pages(readme, report).items():
        drifted += [f"{page.stem} {name}" for name in check_readme(page, blocks)]
    return drifted


def _pages(readme: Path | None, report: Report) -> dict[Path, dict[str, str]]:
    """Pages with generated blocks -> their blocks: the README, and what stands beside it in docs/."""
    if readme is None:
        return {}
    scale = readme.parent / "docs" / "scale.md"
    return {readme: report.blocks, **({scale: page_blocks(report.profile.plans)} if scale.is_file() else {})}


def in_paper_folder(results_dir: Path, name: str) -> Path:
    """A file about the paper: beside the results, else that of the checkout."""
    beside = results_dir / "paper" / name
    return beside if beside.is_file() else PACKAGE.parent / "results" / "paper" / name


def _report(
    suite_cells: Mapping[str, list[Cell]], records: Iterable[Record], results_dir: Path, set_aside: Sequence[str] = ()
) -> Report:
    name = next((s for s in MAIN_SUITES if s in suite_cells), None)
    if name is None:
        raise ValueError(
            f"the report needs the cells of {' or '.join(MAIN_SUITES)}; got: {', '.join(suite_cells) or 'none'}"
        )
    by_key = {r["run_key"]: r for r in records}
    results, reported = Results(suite_cells[name], by_key), load_reported(in_paper_folder(results_dir, "reported.yaml"))
    scale = Results(suite_cells.get("paper") or suites.paper("llama-7b", "hub", "cuda"), by_key)
    bench = _benchmarks(results_dir / "bench")
    named = Results(suite_cells["smollm2"], by_key) if suite_cells.get("smollm2") else None
    curves = Results(suite_cells["frontier"], by_key) if suite_cells.get("frontier") else None
    ledger = judge(load_claims(in_paper_folder(results_dir, "claims.yaml")), results, scale, bench, named, curves)
    made = {
        "claims": claims_table(ledger),
        "table1": tables.table1(results, name),
        "table1_paper": tables.paper_table(results, reported),
        "paper_tables": more_tables.paper_tables(results, reported),
        "sizes": more_tables.sizes(results),
        "ablations": more_tables.ablations(results),
        "neurons": more_tables.neurons(results),
        "union": more_tables.union(results),
        "traffic": traffic_table(results, name),
        "sweep": more_tables.sweep(),
        "neighbours": neighbours_table(results_dir / "neighbours"),
        "real": tables.real(Results(suite_cells["real"], by_key)) if suite_cells.get("real") else tables.real_not_run(),
    }
    made |= {t.name: t for t in (pretrained(named) if named else [not_run()])}
    if named:
        made["smollm2_sweep"] = more_tables.real_sweep(smollm2.NAME)
    made["frontier"] = frontier_table(curves or Results([], {}))
    real_curves = Results(suite_cells["frontier_smollm2"], by_key) if suite_cells.get("frontier_smollm2") else None
    if real_curves is not None:
        made["frontier_smollm2"] = frontier_table(real_curves, "frontier_smollm2", frontier.REAL_TASK)
    for suite in ("paper", "paper_mistral"):
        if suite_cells.get(suite):
            found = Results(suite_cells[suite], by_key)
            columns = tables.comparison_columns(found)
            made[suite] = tables.score_table(f"suite_{suite}", found, "table1", "paper", columns)
    profile = profile_report(results_dir / "profile", reported, by_key.values())
    shown = readme_blocks(ledger, results, profile.profiles, name, _set_aside(set_aside), named)
    told, sizes = _facts(name, results, set_aside, bench, named), bases.base_parameters(results, named, scale)
    return Report(ledger, made, shown, results, reported, bench, told, profile, sizes, curves, named, real_curves)


def _set_aside(found: Sequence[str]) -> str:
    """The files that are no records, by name, before everything that was made without them."""
    if not found:
        return ""
    head = f"**Left out: {len(found)} file{'s' * (len(found) > 1)} in the records' folders that cannot be read.**"
    return f"{head} {'; '.join(map(plain, found))}."


def _facts(
    suite: str,
    results: Results,
    set_aside: Sequence[str] = (),
    bench: Mapping[str, Any] | None = None,
    real: Results | None = None,
) -> dict[str, str]:
    """What the page's head says of the records."""
    records = results.records()
    planned = sum(len(seeds) for seeds in results.places.values())
    versions = sorted(
        {f"torch {r['provenance']['packages']['torch']}" for r in records if "packages" in r["provenance"]}
    )
    told = {
        "suite": suite,
        "model": ", ".join(sorted({c.spec.model for seeds in results.places.values() for c in seeds.values()})),
        "records": f"{len(records)} of {planned} planned runs",
        "seeds": ", ".join(map(str, results.seeds())),
        "evidence": listed(r["quality"]["evidence"] for r in records if r["quality"]) or "not run",
        "versions": ", ".join(versions) or "none",
    }
    if real is not None:
        told[on_real.NAME] = on_real.progress(real) or f"all {len(real.records())} planned runs are there"
    if old := sum(map(results.stale, records)):
        told["stale"] = f"{old} of {len(records)} runs were made by an earlier version of the code"
    old_benchmarks = [f"{part} was {b['why_not']}" for part, b in (bench or {}).items() if b["why_not"]]
    if old_benchmarks:
        told["stale benchmarks"] = f"{'; '.join(old_benchmarks)} (make bench)"
    if set_aside:
        told["left out"] = "; ".join(set_aside)
    return {name: one_line(text) for name, text in told.items()}


def _benchmarks(folder: Path) -> dict[str, Any]:
    """File stem -> content of the benchmarks, with why_not: why one does not count. Raises ValueError for one that is
    no JSON object with its evidence."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = visible(read_json(path))
            if not isinstance(content, dict) or content.get("evidence") not in EVIDENCE:
                raise ValueError("not a JSON object that says its evidence")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the benchmark {path.name} ({error}): run make bench again") from None
        found[path.stem] = {**content, "why_not": bench_why_not(path.stem, content)}
    return found


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
