"""The report: records in, tables, figures and README blocks out. Equal records give equal bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import Cell
from meft_bench.report import figures, tables
from meft_bench.report.cells import Record, Results
from meft_bench.report.paper import load_reported
from meft_bench.report.readme import check_readme, update_readme
from meft_bench.report.text import Table
from meft_bench.report.traffic import traffic_table
from meft_bench.report.verdict import summary
from meft_bench.report.write import write_if_changed

MAIN_SUITES = ("default", "smoke")
"""The first of these that is given fills Table 1 and Figure 1."""


def build_report(
    suite_cells: Mapping[str, list[Cell]], records: Iterable[Record], results_dir: Path, readme: Path | None = None
) -> list[Path]:
    """Write results_dir/tables/*.md|csv, results_dir/figures/*.svg|png and the README's blocks; returns what changed.

    suite_cells: suite name -> its cells; needs default or smoke, takes real and paper. Raises ValueError when the
    paper's numbers, the README's markers or the disk are not as they should be; nothing is written before the first
    two are checked.
    """
    main, results = _main(suite_cells, by_key := {r["run_key"]: r for r in records})
    reported = load_reported(reported_path(results_dir))
    made = _tables(suite_cells, by_key, main, results, reported)
    blocks = _blocks(made, summary(results, reported))
    if readme is not None:
        check_readme(readme, blocks)
    files = {results_dir / "tables" / n: text.encode() for t in made.values() for n, text in t.files().items()}
    files |= {results_dir / "figures" / name: content for name, content in figures.draw(results, reported).items()}
    written = [path for path, content in sorted(files.items()) if write_if_changed(path, content)]
    if readme is not None and update_readme(readme, blocks):
        written.append(readme)
    return written


def check_report(
    suite_cells: Mapping[str, list[Cell]], records: Iterable[Record], results_dir: Path, readme: Path | None = None
) -> list[str]:
    """Names of the tables and README blocks that are not what the records give; writes nothing.

    Figures are left out: their bytes also depend on matplotlib's version.
    """
    main, results = _main(suite_cells, by_key := {r["run_key"]: r for r in records})
    reported = load_reported(reported_path(results_dir))
    made = _tables(suite_cells, by_key, main, results, reported)
    expected = {f"tables/{n}": text.encode() for t in made.values() for n, text in t.files().items()}
    drifted = [name for name, content in sorted(expected.items()) if not _holds(results_dir / name, content)]
    if readme is not None:
        drifted += [f"README {name}" for name in check_readme(readme, _blocks(made, summary(results, reported)))]
    return drifted


def reported_path(results_dir: Path) -> Path:
    """The paper's numbers: beside the results, else those of the checkout."""
    beside = results_dir / "paper" / "reported.yaml"
    return beside if beside.is_file() else PACKAGE.parent / "results" / "paper" / "reported.yaml"


def _main(suite_cells: Mapping[str, list[Cell]], records: dict[str, Record]) -> tuple[str, Results]:
    name = next((s for s in MAIN_SUITES if s in suite_cells), None)
    if name is None:
        raise ValueError(
            f"the report needs the cells of {' or '.join(MAIN_SUITES)}; got: {', '.join(suite_cells) or 'none'}"
        )
    return name, Results(suite_cells[name], records)


def _tables(
    suite_cells: Mapping[str, list[Cell]], records: dict[str, Record], main: str, results: Results, reported: dict
) -> dict[str, Table]:
    """README block name -> table, in the order they are told."""
    made = {
        "table1": tables.table1(results, main),
        "paper": tables.paper_table(results, reported),
        "traffic": traffic_table(results, main),
        "real": tables.real(Results(suite_cells["real"], records))
        if suite_cells.get("real")
        else tables.real_not_run(),
    }
    if suite_cells.get("paper"):
        at_scale = Results(suite_cells["paper"], records)
        columns = tables.comparison_columns(at_scale)
        made["paper_suite"] = tables.score_table("paper_suite", at_scale, "table1", "paper", columns)
    return made


def _blocks(made: dict[str, Table], sentences: str) -> dict[str, str]:
    """README block name -> Markdown; the paper suite's table has no block of its own."""
    return {"summary": sentences, **{name: t.markdown for name, t in made.items() if name != "paper_suite"}}


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
