"""A session: predictions, CUDA tests, the base once, row after row until the time is used; each kept when it is there.

Rows of one batch and sequence share a file, a measured profile as `meft-bench profile` writes them on a GPU: reports
read it where it lies, in results/profile. A row is left out of the file when no time was left for it, and the same
command measures it later.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from meft_bench.gpu import box as boxes
from meft_bench.gpu import cuda_tests, predictions
from meft_bench.gpu.box import Box
from meft_bench.gpu.rows import List, Row
from meft_bench.profile import results
from meft_bench.profile.base import Base
from meft_bench.profile.best import RESIDENT
from meft_bench.profile.measure_plan import card_name, opened, settings_of, why_not_measured
from meft_bench.profile.measured import measure_on
from meft_bench.profile.measured_row import measured_row, skipped_row
from meft_bench.profile.runs import size_if_any
from meft_bench.profile.simulated_row import add_practicality
from meft_bench.profile.variants import KNOWN
from meft_bench.provenance import code_digest, provenance

TESTS_SHARE, TESTS_S = 0.25, 110.0
"""Of the session, and at the most, for the CUDA tests."""
_LEAST_ROW_S = 5.0
_WHOLE_SHARE = 0.12
"""Of the session, kept back for the seconds by part and the traces at its end."""
_TIMES = ("step_s_by_accumulation", "step_s_spread", "steps", "tokens_per_s_by_accumulation")
_ROOT = Path(__file__).parents[2]
_MADE = _ROOT / "results" / "runs" / "gpu-predictions"
"""Predictions that a session makes itself: not beside its rows, where every file is taken for a profile."""


Files = Mapping[tuple[int, int, int], tuple[Path, dict[str, Any]]]
"""Row.place -> the file of its rows and what it holds."""


class OutOfTime(Exception):
    """The session is over."""


class DeviceLost(Exception):
    """Every later row of this process would only repeat the error. row: the one that met it."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row["reason"])
        self.row = row


class Session:
    """One run of the command. say: prints a line. Where a file of another machine, or of other code, lies in the place
    of its own, making it raises ValueError: before the tests take their time."""

    def __init__(
        self,
        wanted: List,
        box: Box,
        output: Path,
        *,
        seconds: float,
        commit: str | None = None,
        host_bytes: int | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.wanted, self.box, self.output, self.say = wanted, box, output, say
        self.seconds, self.end, self.host_bytes = seconds, time.monotonic() + seconds, host_bytes
        self.kept_back = 0.0
        """Seconds before the end at which rows stop."""
        self.card = card_name(box.gpu)
        self.base: Base | None = None
        self.made = _where(commit)
        self.files: Files = {row.place: self._open(row.place) for row in wanted.rows}

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    # ---- before the rows ----

    def predict(self, file: Path) -> tuple[dict[str, dict[str, Any]], str]:
        """(Row.name -> prediction, where from). Where the file has none for this card they are made now, in a process
        of their own, since the simulated GPU is a device of the whole process."""
        found, source = predictions.kept(file, self.card, self.wanted)
        if not found and _MADE.joinpath(f"{self.card}.json").is_file():
            found, source = predictions.kept(_MADE / f"{self.card}.json", self.card, self.wanted)
        if found or self.box.device == "cpu":
            return found, source
        own, limit_s = _MADE / f"{self.card}.json", max(1.0, self.left / 4)
        self.say(f"{source}: simulating the rows first, for at most {limit_s:.0f} s")
        command = [sys.executable, "-m", "meft_bench", "gpu", "--predict", "--cards", self.card, "--output", str(own)]
        try:
            subprocess.run(command, cwd=_ROOT, timeout=limit_s, check=True, capture_output=True)
            return predictions.kept(own, self.card, self.wanted)
        except subprocess.TimeoutExpired:
            return {}, f"not predicted: {limit_s:.0f} s did not suffice to simulate the rows"
        except (subprocess.SubprocessError, OSError) as error:
            said = getattr(error, "stderr", None) or b""
            why = (said.decode(errors="replace").strip().splitlines() or [type(error).__name__])[-1]
            return {}, f"not predicted: {why[:200]}"

    def tests(self) -> str:
        """Run the tests that need a GPU; their last line, or why they did not run. The log lies beside the rows."""
        limit_s = min(TESTS_S, TESTS_SHARE * self.seconds)
        return cuda_tests.run(self.output / f"gpu-tests_{self.card}.txt", limit_s)

    # ---- rows ----

    def rows(self, predicted: dict[str, dict[str, Any]], source: str) -> list[Path]:
        """Measure what the files lack while there is time; returns the files. Raises ValueError where the device is
        lost."""
        files = self.files
        self.say(_heading())
        rows = self._in_order(files)
        self.kept_back = _WHOLE_SHARE * self.seconds if any(row.whole for row in rows) else 0.0
        lacking = self._each(rows, files, predicted, source)
        self.kept_back = 0.0
        self._whole(rows, files, predicted, source)
        if lacking:
            return self._ended(lacking, [p for p, _ in files.values()])
        return [path for path, content in files.values() if content["rows"]]

    def _each(
        self, rows: Sequence[Row], files: Files, predicted: dict[str, dict[str, Any]], source: str
    ) -> Sequence[Row]:
        """Measure what the files lack while there is time; returns the rows for which there was none."""
        for number, row in enumerate(rows):
            path, content = files[row.place]
            there = [r for r in self._known(row, content) if r["state"] != "not-run"]
            if not there:
                if self.left - self.kept_back < _LEAST_ROW_S:
                    return rows[number:]
                try:
                    made = self._row(row)
                except OutOfTime:
                    return rows[number:]
                except DeviceLost as lost:
                    self._keep(path, content, {**lost.row, **_beside(lost.row, predicted.get(row.name), source)})
                    raise ValueError(
                        f"the GPU answers this process no more ({lost}): what was measured is kept; the same command "
                        f"goes on with the other rows, and tries {row.name} again at the end"
                    ) from lost
                self._keep(path, content, {**made, **_beside(made, predicted.get(row.name), source)})
                there = [made]
            self.say(_line(row, there[0], predicted.get(row.name), _resident(row, content, self.wanted.model)))
        return ()

    def _whole(self, rows: Sequence[Row], files: Files, predicted: dict[str, dict[str, Any]], source: str) -> None:
        """Seconds by part and Kineto's trace of the rows that want them, last of all: what CUPTI leaves behind in a
        process that it has traced slows every later step, by a tenth and more. So times stay those from before, and
        MEFT, whose parts are many, comes before the resident adapter."""
        for row in reversed(rows):
            path, content = files[row.place]
            before = next((r for r in self._known(row, content) if r["state"] == "ok"), None)
            if not row.whole or before is None or before["time"]["components_s"]:
                continue
            if self.left < _LEAST_ROW_S:
                return
            try:
                made = self._row(row, whole=True)
            except OutOfTime:
                return
            except DeviceLost as lost:
                self.say(f"{row.name}: no seconds by part and no trace: {lost}")
                return
            if made["state"] == "ok" and made["time"]["components_s"]:
                made["time"] |= {name: before["time"][name] for name in _TIMES}
                self._keep(path, content, {**made, **_beside(made, predicted.get(row.name), source)})
                self.say(f"{row.name}: with seconds by part now")

    def _in_order(self, files: Files) -> list[Row]:
        """In order of worth, but what was tried without a result comes last: a row that costs the process its device
        would keep all rows behind it from being measured."""
        return sorted(
            self.wanted.rows, key=lambda r: any(k["state"] == "not-run" for k in self._known(r, files[r.place][1]))
        )

    def _known(self, row: Row, content: dict[str, Any]) -> list[dict[str, Any]]:
        key = row.spec(self.wanted.model).key
        return [r for r in content["rows"] if r["key"] == key]

    def _ended(self, rows: Sequence[Row], paths: list[Path]) -> list[Path]:
        names = ", ".join(row.name for row in rows)
        self.say(f"the time is used; the same command goes on with: {names}")
        return [path for path in paths if path.is_file()]

    def _row(self, row: Row, whole: bool = False) -> dict[str, Any]:
        spec, base = row.spec(self.wanted.model), self._base()
        try:
            made = measure_on(
                base,
                spec,
                steps=self.wanted.steps,
                later_steps=self.wanted.later_steps,
                warmup=self.wanted.warmup,
                vocabulary=row.tokens or None,
                accumulations=row.accumulations,
                host_bytes=self.host_bytes,
                go_on=self._go_on,
                whole=whole,
            )
        except OutOfTime:
            raise
        except Exception as error:  # one row's failure is no reason to lose the others
            size = size_if_any(spec, base.counted)
            if not self._answers():
                said = cuda_tests.without_places((str(error).splitlines() or [type(error).__name__])[0])
                raise DeviceLost(skipped_row(spec, size, "not-run", said, "measured")) from error
            state, reason = why_not_measured(error)
            # It is sent back: a package that builds itself may name its folder, which may be called by its user.
            return skipped_row(spec, size, state, cuda_tests.without_places(reason), "measured")
        return measured_row(made)

    def _answers(self) -> bool:
        """Whether the device still does; after an illegal access, say, every call of the process fails."""
        try:
            if self.box.device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _go_on(self) -> None:
        if self.left < self.kept_back:
            raise OutOfTime

    def _base(self) -> Base:
        if self.base is None:
            self.base = Base(self.wanted.config, self.box.device)
        return self.base

    # ---- files ----

    def _open(self, place: tuple[int, int, int]) -> tuple[Path, dict[str, Any]]:
        batch, seq, tokens = place
        rows = [row for row in self.wanted.rows if row.place == place]
        arguments = {
            "accumulations": sorted({1, *(a for row in rows for a in row.accumulations)}),
            "steps": self.wanted.steps,
            "warmup": self.wanted.warmup,
        }
        shape = _shape(self.wanted.config)
        machine = {"gpu": self.box.gpu, "memory_bytes": self.box.memory_bytes}
        settings = settings_of(self.wanted.model, self.wanted.config, shape, machine, arguments, batch, seq, None)
        settings |= {"drawn_from": tokens or self.wanted.config.vocab_size, "session": True}
        few = f"-of-{tokens}" if tokens else ""
        path = self.output / f"{self.wanted.model}_{self.card}-session-{batch}x{seq}{few}.json"
        return path, opened(path, settings, [KNOWN[row.variant].method for row in rows])

    def _keep(self, path: Path, content: dict[str, Any], made: dict[str, Any]) -> None:
        known = {r["key"]: r for r in content["rows"]}  # a row that is measured again stays in its place
        content["rows"] = list({**known, made["key"]: made}.values())
        add_practicality(content["rows"])
        content["provenance"] = self.made
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_profile(path, content)


def _where(commit: str | None) -> dict[str, Any]:
    """provenance(), what nvidia-smi says, and the digest of the code, by which `publish` finds the commit where no git
    could tell it."""
    made = {**provenance(torch.get_num_threads()), **boxes.facts(), "code": code_digest(_ROOT)}
    if made["commit"] is None and commit is not None:
        del made["commit_reason"]
        made["commit"] = commit
    return made


def _shape(config: Any) -> Any:
    from meft_bench.profile import shapes
    from meft_bench.train.models import shape_of

    return shape_of(shapes.build(config, "meta", torch.bfloat16, random=False))


def _beside(made: dict[str, Any], predicted: dict[str, Any] | None, source: str) -> dict[str, Any]:
    """What was predicted for a row, and by how much it was wrong."""
    if predicted is None:
        return {"predicted": None, "predicted_reason": source}
    if "reason" in predicted:
        return {"predicted": None, "predicted_reason": predicted["reason"]}
    block: dict[str, Any] = {"predicted": {**predicted, "source": source}}
    if made["state"] == "ok":
        block["predicted"]["error"] = predictions.error_of(predicted, made["time"]["tokens_per_s_by_accumulation"])
    return block


def _resident(row: Row, content: dict[str, Any], model: str) -> dict[str, float]:
    """Tokens/s of the resident adapter of the same size in this file, by micro-batches a step."""
    found = [r for r in content["rows"] if (r["variant"], r["neurons"]) == (RESIDENT, row.neurons)]
    return found[0]["time"]["tokens_per_s_by_accumulation"] if found and found[0]["state"] == "ok" else {}


def _heading() -> str:
    return f"{'row':<52}{'A':>3}{'tok/s':>10}{'predicted':>11}{'error':>8}{'of resident':>12}{'GiB':>7}"


def _line(row: Row, made: dict[str, Any], predicted: dict[str, Any] | None, resident: dict[str, float]) -> str:
    if made["state"] != "ok":
        return f"{row.name:<52}  {made['state']}: {made['reason']}"
    lines: list[str] = []
    told, memory = (predicted or {}).get("tokens_per_s") or {}, made["memory"]
    peaks = memory.get("device_peak_bytes_by_accumulation") or {}
    for accumulation, speed in made["time"]["tokens_per_s_by_accumulation"].items():
        said, base, peak = told.get(accumulation), resident.get(accumulation), peaks.get(accumulation)
        lines.append(
            f"{row.name if not lines else '':<52}{accumulation:>3}{speed:>10.0f}"
            f"{'-' if said is None else format(said, '.0f'):>11}"
            f"{'-' if said is None else format(100 * (said / speed - 1), '+.0f') + ' %':>8}"
            f"{'-' if base is None else format(speed / base, '.2f'):>12}"
            f"{'-' if peak is None else format(peak / 2**30, '.1f'):>7}"
        )
    more = memory.get("accumulated", {"fits": True})
    if not more["fits"]:
        lines.append(f"{'':<52}  oom: {more['device_peak_bytes_reason']}")
    return "\n".join(lines)
