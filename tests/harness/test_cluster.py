"""What is asked of Slurm and when: by commands that stand in for its own and write down what they are told."""

import importlib.util
import os
from pathlib import Path

import pytest

from meft_bench import cli
from meft_bench.harness import cluster, needs, runner, slurm, status
from meft_bench.harness.cluster import Jobs
from meft_bench.harness.runner import locked, plan
from meft_bench.train.methods import ModelShape
from tests.methods import short_spec

ROOT = Path(__file__).parents[2]
pytest.importorskip("submitit")

_COMMANDS = {
    "sinfo": 'cat "$SLURM_SAYS/partitions"',
    "squeue": 'echo "$@" >> "$SLURM_SAYS/asked"; cat "$SLURM_SAYS/queue"',
    "sacct": 'cat "$SLURM_SAYS/accounts" 2>/dev/null || { echo "accounting storage is disabled" >&2; exit 1; }',
    "scontrol": "exit 0",
    "srun": "exit 0",
    # Its third array is one too many where a limit is set.
    "sbatch": """
n=$(ls "$SLURM_SAYS" | grep -c '^script')
if [ -e "$SLURM_SAYS/limit" ] && [ $n -ge $(cat "$SLURM_SAYS/limit") ]; then
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1
fi
cat "$1" > "$SLURM_SAYS/script$n"; echo "Submitted batch job $((4711 + n))\"""",
}


@pytest.fixture
def says(tmp_path, monkeypatch) -> Path:
    """The folder in which Slurm's answers stand, and what it was told."""
    folder, commands = tmp_path / "says", tmp_path / "commands"
    folder.mkdir()
    commands.mkdir()
    for name, line in _COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    (folder / "partitions").write_text("cpu*|2:00:00\ngpu|1-00:00:00\nlong|infinite\n")
    (folder / "queue").write_text("")
    monkeypatch.setenv("SLURM_SAYS", str(folder))
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return folder


def _scripts(says: Path) -> list[dict[str, str]]:
    """The options of every script that sbatch got, and its command."""
    found = []
    for script in sorted(says.glob("script*")):
        lines = script.read_text().splitlines()
        options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
        found.append({name: value for name, _, value in options} | {"command": lines[-1]})
    return found


def _submit(specs, runs: Path, workers: int | None = None, **settings) -> None:
    cluster.submit(plan(specs, runs), runs, {}, Jobs(cluster="slurm", **settings), workers)


def test_runs_that_ask_for_the_same_are_one_array(says, tmp_path, capsys):
    runs = tmp_path / "runs"
    on_cpu = [short_spec("meft", seed=seed) for seed in (1, 0)]
    on_gpu = [short_spec("lora", device="cuda")]
    _submit(on_cpu + on_gpu, runs, workers=1, partition="gpu", account="lab", qos="low", constraint="a100|h100")
    array, single = sorted(_scripts(says), key=lambda script: "gpus-per-node" in script)
    assert array["array"] == "0-1%1" and "array" not in single
    for script in (array, single):
        named = {name: script[name] for name in ("partition", "account", "qos", "constraint", "signal", "open-mode")}
        assert named == {"partition": "gpu", "account": "lab", "qos": "low", "constraint": "'a100|h100'",
                         "signal": "USR2@300", "open-mode": "append"}  # fmt: skip
        assert "requeue" in script and "wckey" not in script
        assert f"--cpus-per-task={script['cpus-per-task']}" in script["command"], "srun does not take them by itself"
        assert script["command"].endswith(f"-u -m submitit.core._submit {runs / '.jobs'}")
    assert (array["time"], array["mem"], array["cpus-per-task"]) == ("30", "4G", "1")
    assert (single["time"], single["gpus-per-node"], single["cpus-per-task"]) == ("480", "1", "8")
    first = {runner.run_dir(runs, spec).name: cluster.job_id(runner.run_dir(runs, spec)) for spec in on_cpu}
    assert sorted(name.partition("_")[2] for name in first.values()) == ["0", "1"]
    assert first[on_cpu[0].run_key].endswith("_0"), "in the order of the plan, which may be that of worth"
    assert runner.read_spec(runs / on_gpu[0].run_key) == on_gpu[0]
    assert capsys.readouterr().out.count("submitted as job") == 2


def test_what_is_kept_for_a_job_is_a_plain_command(says, tmp_path):
    runs = tmp_path / "runs"
    (spec,) = [short_spec("lora")]
    _submit([spec], runs)
    (kept,) = (runs / ".jobs").glob("*.pkl")
    content = kept.read_bytes()
    assert b"execv" in content and b"meft_bench.harness.job" in content and str(runs / spec.run_key).encode() in content
    assert b"meft_bench.harness.cluster" not in content, "no code of ours is unpickled"


def test_the_flags_stand_before_the_plan(says, tmp_path):
    _submit([short_spec("lora")], tmp_path / "runs", minutes=90, memory="10GB", cpus_per_run=3)
    (script,) = _scripts(says)
    assert (script["time"], script["mem"], script["cpus-per-task"]) == ("90", "10G", "3")
    assert "partition" not in script, "Slurm's default"


def test_time_stays_within_the_partitions_limit(says, tmp_path):
    (says / "partitions").write_text("cpu*|10:00\n")
    _submit([short_spec("lora")], tmp_path / "runs")
    (script,) = _scripts(says)
    assert script["time"] == "10" and script["signal"] == "USR2@150"


def test_a_run_is_not_submitted_twice(says, tmp_path, capsys):
    runs, specs = tmp_path / "runs", [short_spec("lora", seed=seed) for seed in range(3)]
    _submit(specs[:2], runs)
    (says / "queue").write_text("4711_0|PENDING|(Priority)|0:00\n4711_1|RUNNING|node7|1:02\n99|RUNNING|node1|3:00\n")
    _submit(specs, runs)
    assert "2 have a job already" in capsys.readouterr().out
    assert "array" in _scripts(says)[0] and "array" not in _scripts(says)[1], "only the third was submitted"
    with locked(runs / specs[0].run_key):
        (says / "queue").write_text("")
        _submit(specs, runs)
    assert _scripts(says)[2]["array"] == "0-1%2", "one is at work although its job is not known"
    assert "--user=" in (says / "asked").read_text()


def test_a_run_whose_job_is_over_is_submitted_again(says, tmp_path):
    runs, spec = tmp_path / "runs", short_spec("lora")
    _submit([spec], runs)
    _submit([spec], runs)
    assert cluster.job_id(runs / spec.run_key) == "4712"


def test_what_slurm_refuses_is_said_with_what_is_submitted(says, tmp_path):
    (says / "limit").write_text("1")
    specs = [short_spec("lora"), short_spec("lora", seed=1), short_spec("lora", device="cuda", seed=2)]
    with pytest.raises(ValueError, match=r"Slurm refused 1 runs .*QOSMaxSubmitJobPerUserLimit; 2 of 3 runs are submit"):
        _submit(specs, tmp_path / "runs")
    assert cluster.job_id(tmp_path / "runs" / specs[1].run_key) == "4711_1"
    assert cluster.job_id(tmp_path / "runs" / specs[2].run_key) is None


def test_long_lists_are_several_arrays(says, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_MOST_IN_ARRAY", 2)
    _submit([short_spec("lora", seed=seed) for seed in range(5)], tmp_path / "runs")
    assert [script.get("array") for script in _scripts(says)] == ["0-1%2", "0-1%2", None]


# ---- what is refused ----

REFUSED = [
    ("--cluster moon", "--cluster invalid choice: 'moon'"),
    ("--cluster slurm --partition moon", "unknown partition moon; known: cpu, gpu, long"),
    ("--cluster slurm --partition gpu,moon", "unknown partition moon; known"),
    ("--cluster slurm --minutes 121", "--minutes 121 is more than the 120 that the partition gives a job"),
    ("--cluster slurm --minutes 0", "--minutes 0 must be a whole number of at least 1"),
    ("--cluster slurm --gpus-per-run -1", "--gpus-per-run -1 must be a whole number of at least 0"),
    ("--cluster slurm --gpus-per-run 4", "a run uses one GPU, and --gpus-per-run 4 would leave others idle: give 1"),
    ("--cluster slurm --gpus-per-run 1 --device cpu", "--device cpu and --gpus-per-run 1 do not go together"),
    ("--cluster slurm --gpus-per-run 0 --device cuda", "these runs are made on a GPU: give GPUS_PER_RUN=1"),
    ("--cluster slurm --memory much", "--memory 'much' is no size"),
    ("--cluster local --partition cpu", "--partition is Slurm's: leave it out, or give --cluster slurm"),
    ("--partition cpu", "--partition is for jobs: give --cluster slurm or local"),
]


@pytest.fixture
def replicate(monkeypatch, capsys, tmp_path):
    """The smoke suite in the checkout with these flags: (exit code, printed, said)."""
    monkeypatch.chdir(ROOT)

    def call(flags: str, command: str = "replicate --suite smoke") -> tuple[int, str, str]:
        code = cli.main([*command.split(), *flags.split(), "--runs", str(tmp_path / "runs")])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_bad_input_is_one_line_before_any_work(says, replicate, tmp_path, flags, said):
    code, _, err = replicate(flags)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not _scripts(says)


def test_a_status_of_what_is_no_grid_is_refused(says, replicate):
    assert "no runs of the grid" in replicate("", command="status --suite neighbours")[2]
    assert "unknown suite 'moon'" in replicate("", command="status --suite moon")[2]


def test_a_cluster_that_is_not_there(says, replicate, monkeypatch):
    (says / "partitions").write_text("gpu|infinite\n")
    assert "Slurm has no default partition here: give --partition (known: gpu)" in replicate("--cluster slurm")[2]
    (says / "partitions").unlink()
    assert "sinfo failed: cat: " in replicate("--cluster slurm")[2]
    monkeypatch.setattr(slurm, "_COMMANDS", ("sbatch", "not-slurms", "nor-this"))
    assert "not-slurms, nor-this are not on the PATH: give the command on a login" in replicate("--cluster slurm")[2]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = replicate("--cluster local")
    assert code == 2 and err == (
        "meft-bench: jobs are submitted by submitit, which is not installed: pip install 'meft-bench[cluster]'\n"
    )


# ---- what is asked for, and where runs stand ----


def test_a_suite_is_submitted_and_its_runs_are_found(says, replicate, tmp_path):
    code, out, _ = replicate("--cluster slurm --partition gpu --gpus-per-run 1 --minutes 60 --memory 8GB")
    assert code == 0 and "9 runs submitted as job 4711 (minutes 60, memory 8G, cores 8, GPUs 1" in out
    assert _scripts(says)[0]["array"] == "0-8%9" and _scripts(says)[0]["gpus-per-node"] == "1"
    assert "smoke/report.html" not in out, "nothing to report yet"
    (says / "queue").write_text("4711_0|RUNNING|node7|1:02\n" + "4711_1|PENDING|(Priority)|0:00\n")
    (says / "accounts").write_text("4711_2|OUT_OF_MEMORY\n4711_2.0|OUT_OF_MEMORY\n4711_3|CANCELLED by 0\n")
    code, out, _ = replicate("", command="status")
    assert code == 0 and out.startswith("9 runs: 1 starting, 1 queued, 7 missing\n")
    assert "[slurm 4711_0 RUNNING node7 1:02]" in out and "[slurm 4711_1 PENDING (Priority) 0:00]" in out
    assert "[slurm 4711_2 OUT_OF_MEMORY]" in out and "[slurm 4711_3 CANCELLED]" in out
    code, out, _ = replicate("", command="status --suite smoke --device cuda")
    assert out.startswith("9 runs: 1 starting, 1 queued, 7 missing\n")


def test_a_plan_for_the_papers_suite_asks_what_the_cluster_has(says, replicate):
    code, out, _ = replicate("--cluster slurm --partition gpu --gpu-memory 24GiB", command="replicate --suite paper")
    assert code == 0 and out.rstrip().endswith("0 can run there") and not _scripts(says), "no weights were named"
    assert "a CUDA GPU with" in out and "; there 24.0" in out and "of host memory;" not in out
    assert "a CUDA GPU" not in replicate("--cluster slurm", command="replicate --suite paper")[1]


def test_status_without_a_cluster(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "_answer", lambda *command: pytest.fail("nothing was submitted"))
    spec, other, odd = short_spec("full"), short_spec("lora"), tmp_path / ("0" * 12)
    for each in (spec, other):
        (tmp_path / each.run_key).mkdir()
        runner.write_spec(tmp_path / each.run_key, each)
    (tmp_path / spec.run_key / "checkpoints" / "step-0000004").mkdir(parents=True)
    (tmp_path / other.run_key / "log.txt").write_text("Traceback (most recent call last):\nValueError: no \x1bgood\n")
    odd.mkdir()
    (odd / "lock").touch()
    with locked(tmp_path / spec.run_key):
        assert cli.main(["status", "--runs", str(tmp_path)]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "2 runs: 1 running, 1 failed" and last == f"1 folders hold no spec that can be read: {odd.name}"
    host = os.uname().nodename
    assert lines[0].endswith(f"[{host}:{os.getpid()}, step 4 of 8 kept]") and lines[0].startswith(
        f"{spec.run_key}  run"
    )
    assert lines[1].endswith("[ValueError: no \\x1bgood]")


def test_a_job_id_of_odd_bytes_is_no_job(tmp_path):
    (tmp_path / "job_id").write_bytes(b"47\xff\n")
    assert cluster.job_id(tmp_path) == "47\ufffd"


def test_status_of_a_folder_without_runs_says_how_to_start():
    assert list(status.text([])) == ["no runs here yet: make replicate starts some; --runs names another folder"]


def test_status_without_slurms_answer(says, tmp_path, capsys):
    _submit([short_spec("lora")], tmp_path / "runs")
    (says / "queue").unlink()
    assert cli.main(["status", "--runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "1 runs submitted" in out and "1 missing" in out and "jobs are not shown: squeue failed: cat: " in out


@pytest.mark.parametrize(
    ("said", "minutes"), [("2-12:00:00", 3600), ("1:30:00", 90), ("45:00", 45), ("infinite", None), ("n/a", None)]
)
def test_slurms_times(said, minutes):
    assert slurm._minutes(said) == minutes


def test_a_jobs_needs_grow_with_its_run():
    shape = ModelShape(hidden=4096, layers=32, ffn=11008, query=4096, value=4096, parameters=6_738_415_616)
    size = {"experts": 16, "probed": 4, "kept": 64}
    spec = short_spec("meft", device="cuda", dtype="bfloat16", max_length=256, batch_size=64, accumulation=32)
    asked = []
    for neurons, steps in ((1024, 100), (4096, 100), (4096, 2000)):
        one = type(spec).from_dict({**spec.to_dict(), "options": {**size, "neurons": neurons}, "steps": steps})
        asked.append(needs.needs(one, shape))
    assert asked[0].memory_gib < asked[1].memory_gib == asked[2].memory_gib
    assert asked[1].minutes < asked[2].minutes
    # 2 x 4096 x 4096 x 32 neurons' parameters, each with its moments and gradient, and the base that passes through.
    assert asked[1].memory_gib > (2 * 4096 * 4096 * 32 * 12 + 2 * shape.parameters) / 2**30
    assert all(step in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) for step in (a.memory_gib for a in asked))
