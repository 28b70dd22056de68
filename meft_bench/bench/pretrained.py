"""One training step of MEFT on SmolLM2-135M beside LoRA and the Parallel Adapter of about the same size, in turn.

Every contender has a model of its own and learns from the same batches of the suite's task people. The weights are
taken from the user's cache; where they are not there the part is left out and says so: a benchmark fetches nothing.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench import named
from meft_bench.bench import common
from meft_bench.harness import evaluation, smollm2
from meft_bench.harness.rows import ROWS
from meft_bench.harness.spec import RunSpec
from meft_bench.train import loop, models
from meft_bench.train.methods import find_method, parse_options, require_positive

NUMERICS = 1
"""Raised when what this benchmark counts or times changes (harness/numerics.py)."""
SHARE = "10%"
CONTENDERS = ("meft", "lora", "lora_ffn", "parallel_adapter")
"""The first is divided by the others."""


def pretrained_benchmark(
    output: Path,
    repeats: int = 7,
    specs: Sequence[tuple[str, RunSpec]] | None = None,
    source: str | Path | None = None,
) -> str:
    """Time the contenders' steps in turn; write pretrained.json and pretrained.md into output, return the Markdown.

    specs, source: other contenders, and the model that they train. Raises ValueError for repeats below 1.
    """
    require_positive(repeats=repeats)
    common.open_folder(output)
    if source is None:
        if not named.is_ready(smollm2.NAME):
            return f"pretrained: left out, {smollm2.NAME} is not in the cache (make base MODEL={smollm2.NAME})\n"
        source = named.folder_of(smollm2.NAME)
    specs = specs or contenders()
    made = {row: Contender(spec, source) for row, spec in specs}
    times = common.timed_rounds({row: c.step for row, c in made.items()}, repeats)
    first, *others = made
    rows = [
        {
            "row": row,
            "trainable": c.trainable,
            "seconds": round(common.median(times[row]), 6),
            "times_s": common.rounded(times[row]),
            "first_over_this": common.ratios(times[first], times[row]),
        }
        for row, c in made.items()
    ]
    spec = specs[0][1]
    about = common.about(repeats, base=spec.model.partition("@")[0], task=spec.task, batch=spec.batch_size,
                         tokens=made[first].tokens, dtype=spec.dtype)  # fmt: skip
    return common.write_result(output, "pretrained", {**about, "rows": rows}, _text({**about, "rows": rows}, others))


def contenders() -> list[tuple[str, RunSpec]]:
    """(row, spec) of the suite's own runs on people at SHARE, first seed."""
    model = f"local/{smollm2.NAME}@{named.NAMED[smollm2.NAME].weights_sha256[:12]}"
    found = {c.row: c.spec for c in reversed(smollm2.cells(model, "synthetic")) if c.share == SHARE}
    return [(row, found[row]) for row in CONTENDERS]


@dataclass
class Contender:
    """A model with its method and optimizer; step() learns from the next batch."""

    spec: RunSpec
    source: str | Path

    def __post_init__(self) -> None:
        spec = self.spec
        loaded = models.load_model(self.source, None, spec.dtype, "cpu")
        self._attached = find_method(spec.method).attach(loaded.model, parse_options(spec.method, spec.options), 0)
        self._optimizer = self._attached.make_optimizer(lr=spec.learning_rate, weight_decay=spec.weight_decay)
        task = evaluation.load_task(spec, None)
        examples = loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter)
        self._batches: Callable[[int], loop.Batch] = loop.shuffled(
            self._attached, examples, spec, loaded.tokenizer.pad_token_id
        )
        self._attached.model.train()
        self.trainable = sum(self._attached.parameter_groups().values())
        self.tokens = self._batches(0).real
        self._done = 0

    def step(self) -> None:
        """One optimizer step, whole: what MEFT leaves to the host's workers is waited for."""
        clip = functools.partial(self._attached.clip_gradients, self.spec.clip)
        loop.one_step(self._optimizer, self._batches(self._done).losses, clip)
        self._done += 1
        for updates in getattr(self._optimizer, "updates", ()):
            updates.store.queue.wait()


def _text(result: dict[str, Any], others: Sequence[str]) -> str:
    s, rows = result["settings"], result["rows"]
    lines = [
        f"One training step on {s['base'].removeprefix('local/')}, task {s['task']}, {s['batch']} rows "
        f"({s['tokens']} tokens in the first), {s['dtype']}, {s['threads']} threads on {result['cpu']}; medians of "
        f"{s['repeats']} rounds, each running all contenders on the same batch (measured).",
        "",
        f"| method | trainable | step, s | times faster than {ROWS[rows[0]['row']].title} |",
        "|---|---:|---:|---:|",
    ]
    for r in rows:
        faster = f"{statistics.median(r['first_over_this']):.2f}"
        low, high = min(r["first_over_this"]), max(r["first_over_this"])
        shown = f"{faster} ({low:.2f} to {high:.2f})" if r["row"] in others else "1"
        lines.append(f"| {ROWS[r['row']].title} | {r['trainable']:,} | {r['seconds']:.3f} | {shown} |")
    return "\n".join(lines) + "\n"
