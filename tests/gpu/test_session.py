"""A GPU session at tiny size on the CPU: what it writes, that it goes on, that it ends, what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft_bench import cli
from meft_bench.gpu import box, cuda_tests, predictions, rows, work
from meft_bench.gpu.rows import ROWS, Row
from meft_bench.gpu.work import Session
from meft_bench.harness import published
from meft_bench.harness.numerics import profile_why_not
from meft_bench.profile.session import check_host_memory
from meft_bench.profile.variants import KNOWN, size_options
from meft_bench.provenance import code_digest, commit_of
from meft_bench.report.records.profiles import load_profiles
from meft_bench.train.counts import Counted
from meft_bench.train.methods import find_method
from tests.conftest import APART

ROOT = Path(__file__).resolve().parents[2]
FEW = (
    Row(variant="parallel_adapter", neurons=128, batch=2, seq=16, accumulations=(1, 2), whole=True),
    Row(variant="meft", neurons=128, batch=2, seq=16, accumulations=(1,)),
    Row(variant="parallel_adapter_torchao", neurons=128, batch=2, seq=16, accumulations=(1,)),
    Row(variant="meft", neurons=128, batch=2, seq=16, accumulations=(1,), tokens=2),
)
CPU = box.Box(device="cpu", gpu="none", memory_bytes=0, free_bytes=0)
MAIN, FEWER = "tiny_none-session-2x16.json", "tiny_none-session-2x16-of-2.json"


def session(folder: Path, said: list[str], wanted: Any = FEW, seconds: float = 300) -> Session:
    few = dataclasses.replace(rows.tiny(), rows=wanted)
    return Session(few, CPU, folder, seconds=seconds, say=said.append)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


PREDICTED = {FEW[0].name: {"tokens_per_s": {"1": 100.0, "2": 50.0}, "device_bytes": 5},
             FEW[1].name: {"reason": "not simulated: because"}}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("gpu"), []
    session(folder, said).rows(PREDICTED, "simulated for a test")
    return folder, said


def test_rows_are_profiles_that_the_report_reads(made: tuple[Path, list[str]]) -> None:
    folder, _ = made
    assert sorted(p.name for p in folder.iterdir()) == sorted([MAIN, FEWER])
    profiles = {p.name: p for p in load_profiles(folder)}
    own = profiles[MAIN.removesuffix(".json")]
    assert own.evidence == "measured" and [r["variant"] for r in own.rows if r["state"] == "ok"] == [
        "parallel_adapter", "meft"
    ]  # fmt: skip
    assert own.rows[0]["time"]["components_s"]["gpu"] > 0 and own.rows[1]["time"]["components_s"] == {}
    assert "needs torchao: pip install" in own.rows[2]["reason"]
    few = profiles[FEWER.removesuffix(".json")].rows[0]
    assert few["union"]["union"] < own.rows[1]["union"]["union"], "fewer tokens use fewer neurons"


def test_every_row_stands_beside_what_was_predicted(made: tuple[Path, list[str]]) -> None:
    folder, said = made
    first, second, *_ = read(folder / MAIN)["rows"]
    speeds = first["time"]["tokens_per_s_by_accumulation"]
    assert first["predicted"]["source"] == "simulated for a test"
    assert first["predicted"]["error"] == {
        "1": pytest.approx(100 / speeds["1"] - 1, abs=1e-3), "2": pytest.approx(50 / speeds["2"] - 1, abs=1e-3)
    }  # fmt: skip
    assert (second["predicted"], second["predicted_reason"]) == (None, "not simulated: because")
    assert read(folder / FEWER)["rows"][0]["predicted_reason"] == "simulated for a test"
    shown = f"{100 * (100 / speeds['1'] - 1):+.0f} %"
    assert any(line.startswith(FEW[0].name) and "100" in line and shown in line for line in said)
    assert any("needs torchao" in line for line in said)


def test_a_session_goes_on_where_it_stopped(
    made: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    real = work.measure_on

    def measure_on(base: Any, spec: Any, **arguments: Any) -> Any:
        tried.append(spec.variant)
        return real(base, spec, **arguments)

    monkeypatch.setattr(work, "measure_on", measure_on)
    said: list[str] = []
    assert session(tmp_path, said, seconds=1).rows({}, "none") == []  # too little for any row
    assert not tried and FEW[0].name in said[-1] and not list(tmp_path.iterdir())
    session(tmp_path, said, FEW[:1]).rows({}, "none")
    before = read(tmp_path / MAIN)["rows"][0]
    session(tmp_path, said, FEW[:1]).rows({}, "none")
    # Once, and once more for its parts.
    assert tried == ["parallel_adapter"] * 2 and read(tmp_path / MAIN)["rows"] == [before]


def test_traces_come_last_and_leave_times_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after a trace are slower: a row behind it would be compared with one before it."""
    tried: list[tuple[str, bool]] = []
    first: dict[str, Any] = {}
    real, keep = work.measure_on, Session._keep

    def measure_on(base: Any, spec: Any, **arguments: Any) -> Any:
        tried.append((spec.variant, arguments["whole"]))
        return real(base, spec, **arguments)

    def kept(self: Session, path: Path, content: dict[str, Any], made: dict[str, Any]) -> None:
        first.setdefault(made["variant"], json.loads(json.dumps(made)))
        keep(self, path, content, made)

    monkeypatch.setattr(work, "measure_on", measure_on)
    monkeypatch.setattr(Session, "_keep", kept)
    wanted = (FEW[0], dataclasses.replace(FEW[1], whole=True))
    session(tmp_path, [], wanted).rows(PREDICTED, "simulated for a test")
    names = [row.variant for row in wanted]
    assert tried == [(name, False) for name in names] + [(name, True) for name in reversed(names)]
    found = read(tmp_path / MAIN)["rows"]
    assert {r["variant"] for r in found} == set(names)
    for row in found:
        before = first[row["variant"]]
        assert row["time"]["components_s"] and not before["time"]["components_s"]
        for name in ("step_s_by_accumulation", "step_s_spread", "steps", "tokens_per_s_by_accumulation"):
            assert row["time"][name] == before["time"][name]
        assert row["predicted"] == before["predicted"]


def test_another_machines_file_is_refused_before_anything_is_run(
    made: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same card in another host, say: the GPU's time is not spent on tests first."""
    (tmp_path / MAIN).write_bytes((made[0] / MAIN).read_bytes())
    session(tmp_path, [])
    monkeypatch.setattr("meft_bench.profile.measure_plan.cpu_model", lambda: "another processor")
    with pytest.raises(ValueError, match=f"{MAIN} was measured with other settings: move it away"):
        session(tmp_path, [])


def test_rows_leave_time_for_the_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = session(tmp_path, said, FEW[:2], seconds=100)
    monkeypatch.setattr(Session, "left", property(lambda self: 12.0 + work._LEAST_ROW_S - 1))
    made.rows({}, "none")
    assert said[-1].endswith(f"{FEW[0].name}, {FEW[1].name}") and not list(tmp_path.iterdir())


def test_a_row_that_outlasts_the_session_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    made = session(tmp_path, said, FEW[:2])
    steps = iter(range(8))  # the first row, and the second begun

    def left(self: Session) -> float:
        return 100.0 if next(steps, None) is not None else -1.0

    patch = pytest.MonkeyPatch()
    patch.setattr(Session, "left", property(left))
    made.rows({}, "none")
    patch.undo()
    assert [r["variant"] for r in read(tmp_path / MAIN)["rows"]] == ["parallel_adapter"]
    assert said[-1] == f"the time is used; the same command goes on with: {FEW[1].name}"


def test_one_rows_failure_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = work.measure_on

    def measure_on(base: Any, spec: Any, **arguments: Any) -> Any:
        if spec.variant == "parallel_adapter":
            raise RuntimeError("CUDA error: an illegal instruction\nmore")
        return real(base, spec, **arguments)

    monkeypatch.setattr(work, "measure_on", measure_on)
    session(tmp_path, [], FEW[:2]).rows({}, "none")
    first, second = read(tmp_path / MAIN)["rows"]
    assert (first["state"], first["reason"]) == ("not-run", "failed: RuntimeError: CUDA error: an illegal instruction")
    assert second["state"] == "ok" and "Traceback" in capsys.readouterr().err


def test_a_lost_device_ends_the_session_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call of the process fails; no other row is written down as failing for it. The
    next session goes on behind the row that met it, or it would end there again and again."""
    tried: list[str] = []

    def measure_on(base: Any, spec: Any, **arguments: Any) -> Any:
        tried.append(spec.variant)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(work, "measure_on", measure_on)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    for number in (1, 2):
        made = session(tmp_path, [], FEW[:2])
        made._base()
        made.box = dataclasses.replace(CPU, device="cuda")
        with pytest.raises(ValueError, match="answers this process no more .CUDA error: an illegal memory access"):
            made.rows({}, "none")
        found = [(r["variant"], r["state"]) for r in read(tmp_path / MAIN)["rows"]]
        assert found == [("parallel_adapter", "not-run"), ("meft", "not-run")][:number]
    assert tried == ["parallel_adapter", "meft"]


def test_the_printed_peak_is_that_of_as_many_micro_batches() -> None:
    peaks = {"1": 10 * 2**30, "8": 13 * 2**30}
    memory = {"device_peak_bytes": peaks["1"], "device_peak_bytes_by_accumulation": peaks,
              "accumulated": {"fits": True}}  # fmt: skip
    row: dict[str, Any] = {"state": "ok", "time": {"tokens_per_s_by_accumulation": {"1": 100.0, "8": 200.0}}}
    one, eight = work._line(FEW[0], {**row, "memory": memory}, None, {}).splitlines()
    assert one.split()[-1] == "10.0" and eight.split()[-1] == "13.0"
    memory["accumulated"] = {"fits": False, "device_peak_bytes_reason": "8 micro-batches ran out of memory"}
    assert (
        work._line(FEW[0], {**row, "memory": memory}, None, {})
        .splitlines()[2]
        .endswith("oom: 8 micro-batches ran out of memory")
    )


# ---- the list ----


def test_every_row_of_the_list_is_possible_at_the_7b_shape() -> None:
    """Its options fit together, and the adapter fits a host of 128 GiB: nothing is found out on the GPU's time."""
    wanted = rows.at_7b()
    counted, trained = Counted(wanted.config), {}
    for row in wanted.rows:
        variant = KNOWN[row.variant]
        options = find_method(variant.method).Options(**size_options(variant, row.neurons, counted))
        trained[row.name] = counted.trainable(variant.method, options)
        check_host_memory(variant, trained[row.name], 128 * 2**30)
        if variant.budget:
            assert 0 < options.device_budget < 40 * 2**30, row.name
    resident = trained["parallel_adapter R=3072 2x256"]
    assert all(n == pytest.approx(resident, rel=0.1) for name, n in trained.items() if "R=3072" in name)


def test_the_list_covers_the_continuum_and_its_peers() -> None:
    at = {(r.variant, r.batch * r.seq) for r in ROWS if r.neurons == 3072}
    for variant in ("parallel_adapter", "meft", "meft_budget_50", "meft_budget_100", "meft_fast"):
        assert {(variant, 512), (variant, 4096)} <= at
    assert {"meft_budget_25", "meft_serial", "meft_no_ke_on_device", "meft_keys_on_device", "parallel_adapter_torchao",
            "parallel_adapter_cpu_adam", "parallel_adapter_adam8bit"} <= {v for v, _ in at}  # fmt: skip
    assert [r.variant for r in ROWS[:2]] == ["parallel_adapter", "meft"], "what matters most comes first"
    assert len({r.name for r in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.spec("llama-7b").tokens == row.batch * row.seq
    small = rows.tiny().rows
    assert [r.variant for r in small] == [r.variant for r in ROWS] and len({r.name for r in small}) == len(small)


# ---- the command ----


def test_the_command_needs_neither_an_installation_nor_git_nor_what_evaluates(tmp_path: Path) -> None:
    """From files alone, as they are carried to such a machine: no git, nothing that evaluates."""
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "meft_bench", "baselines",
         "tasks"], capture_output=True, text=True
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, tree / name)
    code = f"""
import sys
for name in ("datasets", "lm_eval", "pandas", "matplotlib", "peft", "git"):
    sys.modules[name] = None
import meft_bench
assert meft_bench.__file__.startswith({str(tree)!r}), meft_bench.__file__
from meft_bench.train.methods import find_method
assert find_method("parallel_adapter").__file__.startswith({str(tree)!r})
from meft_bench.gpu import rows
rows.ROWS = rows.ROWS[:2]
from meft_bench.cli import main
sys.exit(main(["gpu", "--tiny", "--no-tests", "--output", "out", "--commit", "0123456789ab"]))
"""
    places = [p for p in sys.path if p.endswith("site-packages")]
    # -S: no .pth file, so that an editable installation of this package is not seen.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tree, capture_output=True, text=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": ":".join([str(tree), *places]), "OMP_NUM_THREADS": "1",
             "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tree / "out" / MAIN)
    assert [r["state"] for r in found["rows"]] == ["ok", "ok"] and "predictions.json is not here" in done.stdout
    made = found["provenance"]
    assert (made["commit"], made["dirty"], made["code"]) == ("0123456789ab", None, code_digest(tree))
    assert code_digest(tree) == code_digest(ROOT), "the digest is of the files, wherever they lie"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--tiny" in said


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = box.importlib.util.find_spec
    monkeypatch.setattr(box.importlib.util, "find_spec", lambda name: None if name == "yaml" else real(name))
    with pytest.raises(ValueError, match="^a GPU session needs yaml: pip install pyyaml$"):
        box.find(tiny=True)


def test_packages_that_are_too_old_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers before 5 has no module that the base is built with."""
    for name in [n for n in sys.modules if n.startswith("meft_bench.gpu.work")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("meft_bench.gpu.work")
    monkeypatch.setitem(sys.modules, "meft_bench.profile.base", None)
    assert cli.main(["gpu", "--tiny"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"here are torch {torch.__version__}, transformers 5." in said
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, least in box.LEAST_VERSIONS.items():
        assert f"{name} {least} or newer" in said and any(a.startswith(f"{name}>={least}") for a in asked)


@pytest.mark.parametrize("free, fits", [(19, False), (40, True)])
def test_a_card_that_is_full_is_said(monkeypatch: pytest.MonkeyPatch, free: int, fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    if fits:
        assert box.find(tiny=False).gpu == "NVIDIA H100"
        return
    with pytest.raises(ValueError, match="19.0 GiB of the card's 80.0 GiB are free"):
        box.find(tiny=False)


def test_a_card_that_another_process_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In exclusive mode, or without room for a context, the first call to it fails."""

    def mem_get_info() -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    with pytest.raises(ValueError, match="^the GPU does not answer .CUDA error: CUDA-capable.* unavailable.: end"):
        box.find(tiny=False)


@pytest.mark.parametrize("arguments, said", [(["--commit", "main"], "--commit"), (["--seconds", "0"], "--seconds"),
                                             (["--predict", "--cards", "h900"], "h900")])  # fmt: skip
def test_bad_options_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_the_cuda_tests_are_found_run_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_tests.files()
    assert {"tests/gpu/test_on_gpu.py", "tests/bench/test_step.py"} <= set(found)
    assert found[0] == "tests/meft/test_cuda.py", "if time is short, the engine's"
    # One process runs them all, in which the simulated GPU must not take the real one's place.
    assert not [name for name in found if set(APART) & set(Path(name).parts)]
    monkeypatch.setattr(cuda_tests, "files", lambda: ["tests/meft/test_cuda.py"])
    # Of what tests need, such a machine may have pytest alone.
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")
    said = session(tmp_path, []).tests()
    assert said.startswith("CUDA tests: ") and ("skipped" in said or "passed" in said or "failed" in said)
    log = (tmp_path / "gpu-tests_none.txt").read_text()
    assert str(ROOT) not in log and "skipped" in log + said


@pytest.mark.parametrize("answers", [True, False])
def test_tests_that_are_stopped_say_what_failed(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tests, "_LAST_WORDS_S", 20.0 if answers else 0.5)
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, (lambda *_: sys.exit("one failed")) if ANSWERS else signal.SIG_IGN)
print("at work", flush=True)
time.sleep(60)
""".replace("ANSWERS", str(answers))
    log, stopped = cuda_tests.printed([sys.executable, "-S", "-c", code], 3.0)
    assert stopped and log.splitlines() == ["at work", "one failed"][: 1 + answers]


def test_the_log_of_the_tests_names_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent back: folders may be called by their user."""
    home, packages = "/home/somebody", "/home/somebody/.local/lib/python3.11/site-packages"
    monkeypatch.setattr(cuda_tests.Path, "home", lambda: Path(home))
    monkeypatch.setattr(cuda_tests.site, "getusersitepackages", lambda: packages)
    log = f"""{ROOT}/tests/meft/test_cuda.py:7: Error
../..{packages}/torch/cuda.py:3: in f
E  no file {cuda_tests.tempfile.gettempdir()}/pytest-of-somebody/pytest-0/a.json
E  {home}/data and {home}2
"""
    assert (
        cuda_tests.without_places(log)
        == """./tests/meft/test_cuda.py:7: Error
../..PYTHON/torch/cuda.py:3: in f
E  no file TMP/pytest/pytest-0/a.json
E  ~/data and /home/somebody2
"""
    )


def test_a_user_without_a_home_has_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a number that no file of users knows, without HOME."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cuda_tests.Path, "home", no_home)
    assert cuda_tests.without_places(f"{ROOT}/tests/meft/test_cuda.py:7") == "./tests/meft/test_cuda.py:7"


def test_a_row_that_failed_names_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tests.Path, "home", lambda: Path("/home/somebody"))

    def measure_on(base: Any, spec: Any, **arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/home/somebody/.cache/torch_extensions")

    monkeypatch.setattr(work, "measure_on", measure_on)
    session(tmp_path, [], FEW[:1]).rows({}, "none")
    reason = read(tmp_path / MAIN)["rows"][0]["reason"]
    assert reason == "failed: PermissionError: [Errno 13] Permission denied: '~/.cache/torch_extensions'"


def test_the_slot_is_that_of_the_card_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several cards, whose slots differ, CUDA_VISIBLE_DEVICES may leave another than the first."""

    def run(asked: list[str], **_: Any) -> Any:
        if "--id=GPU-a part" in asked:
            raise subprocess.CalledProcessError(6, asked)
        return SimpleNamespace(stdout="570.1, 4, 4\n" if "--id=GPU-bbbb" in asked else "570.1, 5, 16\n")

    monkeypatch.setattr(box.subprocess, "run", run)
    assert box.facts()["nvidia_smi"] == {"driver": "570.1", "pcie": "5 x16"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bbbb"))
    assert box.facts()["nvidia_smi"] == {"driver": "570.1", "pcie": "4 x4"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a part"))
    assert box.facts()["nvidia_smi"]["driver"] == "570.1"


# ---- predictions ----


def test_predictions_are_of_every_row_and_count_while_their_numbers_do(tmp_path: Path) -> None:
    few = dataclasses.replace(rows.tiny(), rows=FEW[:2] + FEW[3:])
    path = tmp_path / "predictions.json"
    code = (
        "import sys, dataclasses, pathlib\nfrom meft_bench.gpu import predictions, rows\n"
        "from tests.gpu.test_session import FEW\n"
        "few = dataclasses.replace(rows.tiny(), rows=FEW[:2] + FEW[3:])\n"
        "predictions.write_predictions(pathlib.Path(sys.argv[1]), ['h100', 'rtx3090'], few, 1)\n"
    )
    # In a process of its own: the simulated GPU is a device of the whole process.
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, source = predictions.kept(path, "h100", few)
    assert set(found) == {r.name for r in few.rows} and source.startswith("simulated from ")
    for row in FEW[:2]:
        assert set(found[row.name]["tokens_per_s"]) == {str(a) for a in {1, *row.accumulations}}
        assert all(speed > 0 for speed in found[row.name]["tokens_per_s"].values())
    assert "counts" in found[FEW[3].name]["reason"]
    assert predictions.kept(path, "a100", few) == ({}, "predictions.json knows no a100")
    content = read(path)
    content["numerics"]["simulator"] += 1
    path.write_text(json.dumps(content))
    assert predictions.kept(path, "h100", few)[0] == {}
    path.write_text("{}")
    with pytest.raises(ValueError, match="predictions.json holds no predictions"):
        predictions.kept(path, "h100", few)


def test_a_session_makes_predictions_away_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them they would be taken for a broken profile; and what is there is not made again."""
    made, asked = session(tmp_path / "rows", []), []
    made.box, made.card = dataclasses.replace(CPU, device="cuda"), "h100"
    monkeypatch.setattr(work, "_MADE", tmp_path / "made")

    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        asked.append(command)
        if len(asked) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        path = Path(command[command.index("--output") + 1])
        path.parent.mkdir(parents=True)
        provenance = {"commit": "0123456789ab"}
        content = {"schema": 1, "model": made.wanted.model, "numerics": predictions.numerics(made.wanted),
                   "cards": {"h100": PREDICTED}, "provenance": provenance}  # fmt: skip
        path.write_text(json.dumps(content))

    monkeypatch.setattr(work.subprocess, "run", run)
    assert made.predict(tmp_path / "none.json") == ({}, "not predicted: 75 s did not suffice to simulate the rows")
    for _ in range(2):
        found, source = made.predict(tmp_path / "none.json")
        assert found == PREDICTED and source == "simulated from 0123456789ab before the session"
    assert len(asked) == 2 and not (tmp_path / "rows").exists()


def test_every_row_has_a_variant_that_can_be_asked_for() -> None:
    assert all(row.variant in KNOWN and not KNOWN[row.variant].trains_base for row in ROWS)


# ---- publish ----


def test_publish_finds_the_commit_of_what_was_measured_without_git(
    made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A history of two commits; the record's code is that of the first."""
    repo = tmp_path / "repo"
    (repo / "meft_bench").mkdir(parents=True)
    profile = repo / "results" / "profile" / MAIN
    profile.parent.mkdir(parents=True)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, "-C", str(repo), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "-q")
    for number in (1, 2):
        (repo / "meft_bench" / "a.py").write_text(f"number = {number}\n")
        git("add", "-A")
        git("commit", "-q", "-m", "a")
        if number == 1:
            first, code = git("rev-parse", "HEAD")[:12], code_digest(repo)
    assert commit_of(repo, code) == first and commit_of(repo, "0" * 64) is None
    content = read(made[0] / MAIN)
    content["provenance"] |= {"commit": None, "commit_reason": "none", "dirty": None, "dirty_reason": "none"}
    for known, adopted in (("f" * 64, []), (code, [MAIN])):
        content["provenance"]["code"] = known
        profile.write_text(json.dumps(content))
        assert published.adopt(repo / "results") == adopted
        why = [] if adopted else [f"profile/{MAIN} was made outside a checkout (make gpu)"]
        assert published.not_counting(repo / "results") == why
    after = read(profile)
    assert (after["provenance"]["commit"], after["provenance"]["dirty"]) == (first, False)
    assert "commit_reason" not in after["provenance"] and after["rows"] == content["rows"]
    assert profile_why_not(after) == ""


def test_the_checkout_can_be_carried() -> None:
    """Its files are below 30 MB, as a machine without a network gets them by hand, and far below without the records of
    runs, which a session does not read (docs/gpu.md)."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in filter(None, listed.stdout.split("\0"))
             if (ROOT / name).is_file()}  # fmt: skip
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    assert sum(sizes.values()) < 30e6, largest
    assert sum(size for name, size in sizes.items() if not name.startswith("results/records/")) < 13e6
