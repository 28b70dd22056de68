"""docs/comparison.md from the records of run.py and the scripts themselves."""

import io
import statistics
import tokenize
from pathlib import Path
from string import Template
from typing import Any

from meft_bench.harness.numerics import comparison_numerics, why_not
from meft_bench.report.records.stats import wilson
from meft_bench.report.text import markdown_table
from meft_bench.train.contract import describe

HERE = Path(__file__).resolve().parent
FP32 = 4
COMMAND = "python docs/comparison/run.py"


def page(records: list[dict[str, Any]], titles: dict[str, str], rates: dict[str, Any]) -> str:
    """The whole page as Markdown. titles: record name to what its row is called, in the table's order; rates: what
    run.py --rates wrote. Raises ValueError when a record's script was not run with every seed that the others have."""
    seeds = {name: sorted(r["seed"] for r in records if r["name"] == name) for name in titles}
    all_seeds = max(seeds.values(), key=len)
    if any(found not in ([], all_seeds) for found in seeds.values()):
        raise ValueError(f"the records hold other seeds for some rows than for others: {seeds}")
    head = ["Method", "Lines to write", "Trainable", "Held-out score", "Step, ms", "Peak memory above the base, MB",
            "Device bytes of the method", "Bytes moved per step"]  # fmt: skip
    rows = [[titles[name], *_row(name, [r for r in records if r["name"] == name])] for name in titles]
    ran = next(r for r in records if r["evidence"] == "measured")
    where = ran["provenance"]
    return Template((HERE / "page.md.in").read_text(encoding="utf-8")).substitute(
        table=_stale_note(records) + markdown_table(head, rows),
        steps=ran["steps"],
        seeds=", ".join(map(str, all_seeds)),
        cpu=where["cpu"],
        torch=where["packages"]["torch"],
        peers=", ".join(f"{name} {version}" for name, version in sorted(where["peers"].items())),
        lora_ffn=_mean(records, "peft_lora-ffn"),
        meft=_mean(records, "meft_loop"),
        tried=_tried(rates),
    )


def _stale_note(records: list[dict[str, Any]]) -> str:
    """What a reader must know before the numbers of records that do not count; "" if all do."""
    why = [why_not(r, comparison_numerics(r["name"])) for r in records]
    parts = [f"{why.count(reason)} of {len(records)} runs were {reason}" for reason in sorted(set(why) - {""})]
    return f"**Stale:** {'; '.join(parts)}. Make them again: `{COMMAND}`.\n\n" if parts else ""


def _tried(rates: dict[str, Any]) -> str:
    """LOMO's rates with their development scores."""
    parts = []
    for variant, scores in sorted(rates["tried"].items()):
        each = ", ".join(
            f"{rate} gives {score:.3f}" for rate, score in sorted(scores.items(), key=lambda x: float(x[0]))
        )
        parts.append(f"{'all weights' if variant == 'full' else 'adapter'}: {each}")
    return "; ".join(parts)


def _mean(records: list[dict[str, Any]], name: str) -> str:
    scores = [r["score"] for r in records if r["name"] == name and r["evidence"] == "measured"]
    return f"{statistics.mean(scores):.3f}" if scores else "(not run)"


def code_lines(path: Path) -> int:
    """Lines of a script that hold code: no blank lines, comments or docstring, no import of job, and not the call that
    hands the model to it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return sum(1 for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
        if token.type not in skipped and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type
    ours = [i for i, line in enumerate(text.splitlines(), 1) if line == "import job" or line.startswith("job.finish(")]
    return len(lines - set(ours))


def script_of(name: str) -> Path:
    """The script of a row, whose name is that of its file and perhaps a variant."""
    stem = name.partition("-")[0]
    return next(path for path in (HERE / f"{stem}.py", HERE / f"{stem}.sh") if path.is_file())


def _row(name: str, records: list[dict[str, Any]]) -> list[str]:
    script = script_of(name)
    lines = f"{code_lines(script)}{' (a command)' if script.suffix == '.sh' else ''}"
    if "parallel_adapter" in script.read_text(encoding="utf-8") and name != "lomo-full":
        lines += f" + {code_lines(HERE / 'parallel_adapter.py')} for the adapter"
    if not records:
        return [lines, f"not run yet: {COMMAND}", *["not run"] * 5]
    ran = [r for r in records if r["evidence"] == "measured"]
    if not ran:
        return [lines, *[f"not run ({_needs(records[0]['reason'])})"], *["not run"] * 5]
    count = ran[0]["trainable"]
    return [lines, f"{count:,}", _score(ran), _steps(ran), _memory(ran), *_device(name, ran)]


def _needs(reason: str) -> str:
    kind = "needs a CUDA GPU" if "cuda" in reason.lower() or "nvidia" in reason.lower() else "failed"
    return f"{kind}: {reason}"


def _score(ran: list[dict[str, Any]]) -> str:
    scores, items = [r["score"] for r in ran], sum(r["items"] for r in ran)
    low, high = wilson(round(sum(r["score"] * r["items"] for r in ran)), items)
    spread = f" ±{statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread} [{low:.3f}, {high:.3f}], n {items:,}"


def _steps(ran: list[dict[str, Any]]) -> str:
    mean = "mean_step_s" in ran[0]
    times = [1000 * r["mean_step_s" if mean else "median_step_s"] for r in ran]
    return f"{statistics.median(times):.0f} ({min(times):.0f}–{max(times):.0f}){', mean' if mean else ''}"


def _memory(ran: list[dict[str, Any]]) -> str:
    if "peak_above_base_bytes" not in ran[0]:
        return "not measured"
    peaks = [r["peak_above_base_bytes"] / 1e6 for r in ran]
    return f"{statistics.median(peaks):.0f} ({min(peaks):.0f}–{max(peaks):.0f})"


def _device(name: str, ran: list[dict[str, Any]]) -> list[str]:
    """Device bytes and bytes moved per step: MEFT's copies were counted, all else is what an engine keeps where."""
    count, nothing = ran[0]["trainable"], "0"
    if name.startswith("peft_"):
        return [f"{16 * count:,} (simulated)", nothing]
    if name == "zero_offload":
        return [f"{8 * count:,} (simulated)", f"{8 * count:,} (simulated)"]
    if name == "lomo-adapter":
        return [f"{FP32 * (count + ran[0]['largest_tensor']):,} (simulated)", nothing]
    if name == "lomo-full":
        return [f"{FP32 * ran[0]['largest_tensor']:,} (simulated)", nothing]
    if name == "galore":
        return [f"{FP32 * count + ran[0]['state_bytes']:,} (simulated)", nothing]
    if (kept := ran[0].get("accounted_bytes")) is not None:
        base_too = "device_parameters_bytes" if describe(name.partition("-")[2]).trains_base else ""
        held = sum(n for purpose, n in kept.items() if purpose.startswith("device_") and purpose != base_too)
        return [f"{held:,} (simulated)", f"{_moved(ran):,.0f}" if "bytes_by_purpose" in ran[0] else nothing]
    if "bytes_by_purpose" not in ran[0]:
        return ["as in a plain loop", "not logged"]
    rows = statistics.mean(r["bytes_by_purpose"]["h2d rows"] / r["steps"] for r in ran)
    held = rows * (1 + 1 / ran[0]["layers"])
    return [f"{held:,.0f} (simulated, from the rows moved)", f"{_moved(ran):,.0f}"]


def _moved(ran: list[dict[str, Any]]) -> float:
    """Bytes a step that a link counted, both ways: the mean over seeds."""
    return statistics.mean(sum(r["bytes_by_purpose"].values()) / r["steps"] for r in ran)
