"""Kill training again and again, go on, and compare with a run that nobody disturbed.

    python tests/kill_sweep.py                       60 kills of `train`, `run` and `replicate --suite smoke`
    python tests/kill_sweep.py --kills 6 --over train

Kills come at moments spread over the time the command takes, and right after files appear that matter (a checkpoint
being written, the result published). Every second one is kill -9, the others are ctrl-C as a terminal sends it, or sent
to one process. After kill -9 the command is repeated once; after ctrl-C the command must have said "stopped" and ended
with 130. The result must be bit-equal, with nothing left beside it. Exit code 1 when any trial failed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
STARTED_S = 0.5  # before this, Python itself is being started and knows no answer to ctrl-C


@dataclass(frozen=True)
class Target:
    """A command to kill, in a folder of its own."""

    name: str
    arguments: list[str]
    resumes: list[str]
    """What is added to go on."""
    events: list[str]
    """Patterns of files whose appearance is a moment to kill at."""
    result: Callable[[Path], Any]
    """What must be equal, from the folder; raises AssertionError for what may not be left there."""


def _adapter(folder: Path) -> dict[str, bytes]:
    assert sorted(f.name for f in folder.iterdir()) == ["out"], f"left behind: {[f.name for f in folder.iterdir()]}"
    found = {f.name: f.read_bytes() for f in (folder / "out").glob("*.safetensors")}
    assert found, "no adapter"
    record = json.loads((folder / "out" / "training.json").read_text())
    return {**found, "scores": json.dumps(record["scores"]).encode()}


def _records(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("runs/*/record.json")):
        record = json.loads(path.read_text())
        assert record["state"] == "ok", record["state"]
        found[record["run_key"]] = (record["curve"], record["quality"], record["traffic"])
    assert found, "no record"
    assert not list(folder.glob("runs/**/.writing-*")) and not list(folder.glob("runs/*/checkpoints/writing"))
    return found


def _train(method: str) -> Target:
    arguments = ["train", "--data", "example", "--steps", "6", "--batch-size", "8", "--eval-rows", "8", "--method",
                 method, "--checkpoint-steps", "2", "--device", "cpu", "--output", "out"]  # fmt: skip
    events = ["out.partial/rows/rows.json", "out.partial/checkpoints/writing/state.safetensors",
              "out.partial/checkpoints/step-0000002", "out.partial/checkpoints/step-0000006",
              "out.partial/adapter/*.safetensors", "out/training.json"]  # fmt: skip
    return Target(f"train {method}", arguments, ["--resume"], events, _adapter)


def _run(method: str, *options: str) -> Target:
    fields = [f"--set={name}" for name in ("steps=40", "train_rows=40", "eval_rows=8", "batch_size=8")]
    arguments = ["run", "--task", "facts", "--method", method, *fields, "--runs", "runs"]
    arguments += [f"--option={option}" for option in options]
    return Target(f"run {method}", arguments, [], ["runs/*/log.txt", "runs/*/record.json"], _records)


def _replicate() -> Target:
    arguments = ["replicate", "--suite", "smoke", "--runs", "runs"]
    return Target("replicate", arguments, [], ["runs/*/record.json", "results/smoke/report.html"], _records)


TARGETS: dict[str, list[Target]] = {
    "train": [_train("meft"), _train("lora"), _train("parallel_adapter")],
    "run": [_run("meft", "neurons=64", "kept=8"), _run("lora", "rank=4")],
    "replicate": [_replicate()],
}


def _prepare(folder: Path) -> None:
    """What replicate expects of a checkout."""
    if not (REPOSITORY / "results" / "paper").is_dir():
        return
    shutil.copytree(REPOSITORY / "results" / "paper", folder / "results" / "paper")
    shutil.copy(REPOSITORY / "README.md", folder)


def _start(target: Target, folder: Path, more: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "meft_bench", *target.arguments, *more], cwd=folder, text=True,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            start_new_session=True)  # fmt: skip


def undisturbed(target: Target, folder: Path) -> tuple[Any, float]:
    """(result, seconds) of a run that nobody kills."""
    folder.mkdir(parents=True)
    if target.name == "replicate":
        _prepare(folder)
    start = time.monotonic()
    process = _start(target, folder, [])
    _, said = process.communicate()
    assert process.returncode == 0, said
    return target.result(folder), time.monotonic() - start


def trial(target: Target, folder: Path, moment: float | str, how: str, expected: Any) -> str:
    """Kill once, go on once; "" or what went wrong. moment: seconds, or a pattern of files to wait for."""
    folder.mkdir(parents=True)
    if target.name == "replicate":
        _prepare(folder)
    process = _start(target, folder, [])
    _wait(process, folder, moment)
    with suppress(ProcessLookupError):  # it was faster than the undisturbed run
        if how == "kill -9":
            process.kill()
        elif how == "ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    code = process.returncode
    # Once the work is whole and the process only ends, ctrl-C ends it at once.
    over = code == -signal.SIGINT and _is(target, folder, expected)
    if how != "kill -9" and code != 0 and not over and (code != 130 or "stopped" not in said or "Traceback" in said):
        return f"ended with {code} and said: {said[-3000:]}"
    if how == "kill -9":
        time.sleep(1)  # its workers notice within half a second
    process = _start(target, folder, target.resumes)
    _, said = process.communicate()
    if process.returncode != 0:
        return f"going on ended with {process.returncode} and said: {said[-3000:]}"
    try:
        return "" if target.result(folder) == expected else "the result is another one"
    except AssertionError as error:
        return str(error)


def _is(target: Target, folder: Path, expected: Any) -> bool:
    try:
        return bool(target.result(folder) == expected)
    except (AssertionError, OSError):
        return False


def _wait(process: subprocess.Popen, folder: Path, moment: float | str) -> None:
    start = time.monotonic()
    while process.poll() is None and (
        time.monotonic() - start < moment if isinstance(moment, float) else not any(folder.glob(moment))
    ):
        time.sleep(0.002)


def moments(target: Target, seconds: float, count: int, chance: random.Random) -> Iterator[float | str]:
    """count of them: files that appear, in turn, and times spread evenly with some chance."""
    events = cycle(target.events)
    for i in range(count):
        share = (i + chance.random()) / count
        yield next(events) if i % 2 else STARTED_S + share * max(0.0, seconds - STARTED_S)


def sweep(targets: list[Target], kills: int, place: Path, seed: int = 0, jobs: int = 1) -> list[str]:
    """All kills over the targets in turn; returns what went wrong, one entry per trial."""
    chance, wrong = random.Random(seed), []
    with ThreadPoolExecutor(jobs) as pool:
        straight = list(pool.map(lambda t: undisturbed(t, place / t.name / "straight"), targets))
        trials = []
        for number, (target, (expected, seconds)) in enumerate(zip(targets, straight, strict=True)):
            share = kills // len(targets) + (number < kills % len(targets))
            ways = cycle(["kill -9", "ctrl-C", "ctrl-C", "kill -9", "kill -9", "one process"])
            for i, moment in enumerate(moments(target, seconds, share, chance)):
                trials.append((target, place / target.name / str(i), moment, next(ways), expected))
        for (target, folder, moment, how, _), error in zip(trials, pool.map(lambda t: trial(*t), trials), strict=True):
            at = moment if isinstance(moment, str) else f"{moment:.2f} s"
            print(f"{'FAILED' if error else 'fine  '} {target.name:<24} {how:<12} {at} {error}", flush=True)
            if error:
                wrong.append(f"{target.name}, {how} at {at}: {error}")
            else:
                shutil.rmtree(folder)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--over", action="append", choices=sorted(TARGETS), help="repeatable (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    args = parser.parse_args()
    targets = [target for name in args.over or TARGETS for target in TARGETS[name]]
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as place:
        wrong = sweep(targets, args.kills, Path(place), args.seed, args.jobs)
    print(f"{args.kills} kills, {len(wrong)} went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
