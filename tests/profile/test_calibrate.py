"""Calibration at tiny sizes: what is written, what is read back, and what is refused. Times are never asserted."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meft_bench import provenance
from meft_bench.cli import main
from meft_bench.profile import cli, measure_plan
from meft_bench.profile.calibrate import _CARD_RATES, _HOST_RATES, SCHEMA, calibrate, from_calibration, markdown
from meft_bench.profile.machine_rates import Scale
from meft_bench.simulate.cards import card

TINY = Scale(
    stream_elements=1000,
    hidden=32,
    neurons=256,
    kept=8,
    tokens=16,
    device_elements=1000,
    product=64,
    copy_bytes=(256, 4096),
    repeats=1,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("calibration") / "new" / "calibration.json"
    return path, calibrate(path, "cpu", TINY)


@pytest.fixture
def with_card(written: tuple[Path, dict]) -> dict:
    """A file of a GPU machine: the measured one, and a card that takes the 24 GB class's numbers."""
    result = copy.deepcopy(written[1])
    for name, unit in _CARD_RATES.items():
        result["constants"][f"card.{name}"] = {
            "value": getattr(card("24GB"), name).value,
            "unit": unit,
            "source": "measured",
        }
    result["provenance"]["gpu"] = "Some GPU"
    return result


def test_the_file_holds_what_is_returned(written: tuple[Path, dict]) -> None:
    path, result = written
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["evidence"] == "measured" and result["settings"]["neurons"] == 256
    assert set(result["constants"]) == {f"host.{name}" for name in _HOST_RATES}
    assert result["copies"] == []


def test_a_host_made_of_the_file(written: tuple[Path, dict]) -> None:
    path, result = written
    no_card, host = from_calibration(path)
    assert no_card is None
    for name in _HOST_RATES:
        constant = getattr(host, name)
        assert constant.value == result["constants"][f"host.{name}"]["value"] > 0
        assert constant.source.startswith("measured")


def test_predictions_stand_beside_measurements(written: tuple[Path, dict]) -> None:
    checks = written[1]["checks"]
    pieces = {c["name"].split(",")[0].split(" of U=")[0] for c in checks}
    assert {
        "selection with Key-Experts",
        "selection without Key-Experts",
        "gather",
        "AdamW over the rows with a gradient",
    } <= pieces
    assert all(c["predicted_s"] > 0 and c["measured_s"] > 0 for c in checks)
    table = markdown({**written[1], "load_before": 0.0})
    assert table.count("\n") == len(checks) + len(_HOST_RATES) + 5
    assert "predicted / measured" in table


def test_a_busy_machine_is_told(written: tuple[Path, dict]) -> None:
    cores = written[1]["provenance"]["cores"]
    assert f"busy (load {cores:.1f} on {cores} cores)" in markdown({**written[1], "load_before": float(cores)})
    assert "busy" not in markdown({**written[1], "load_before": cores / 8})


def test_a_card_made_of_the_file(tmp_path: Path, with_card: dict) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(with_card))
    made, _ = from_calibration(path)
    assert made is not None and "Some GPU" in made.title
    assert made.bandwidth.value == card("24GB").bandwidth.value
    assert made.half_share.value == made.full_share.value == made.bandwidth_share.value == 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), 1, "not a calibration of schema 2"),
        (("constants",), [], "constants or provenance is missing"),
        (("constants", "host.bandwidth"), None, "host.bandwidth must be a positive number, not None"),
        (("constants", "host.bandwidth", "value"), 0, "host.bandwidth must be a positive number, not 0"),
        (("constants", "host.dot_rate", "value"), "fast", "host.dot_rate must be a positive number, not 'fast'"),
        (("constants", "host.overhead", "value"), True, "host.overhead must be a positive number, not True"),
        (("constants", "card.launch", "value"), float("inf"), "card.launch must be a positive number, not inf"),
        (("constants", "card.launch"), {}, "card.launch must be a positive number, not None"),
        (("provenance", "cpu"), ..., "provenance.cpu is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, with_card: dict, place: tuple, value: object, message: str) -> None:
    inner = with_card
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(with_card))
    with pytest.raises(ValueError) as error:
        from_calibration(path)
    assert str(error.value).startswith(f"{path}: {message}") and "profile --calibrate" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot read"), ("{", "is not JSON"), ("[]", "not a calibration")]
)
def test_no_calibration_at_all(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_calibration(path)


def test_the_machine_that_made_constants_measures_under_the_asked_cards_memory(tmp_path, monkeypatch) -> None:
    """The simulation has the calibrated card; what is measured has the cap of the one asked for."""
    rates = {f"card.{n}": {"value": 1e10} for n in _CARD_RATES} | {f"host.{n}": {"value": 1e9} for n in _HOST_RATES}
    made = {"cpu": "x", "threads": 2, "gpu": "NVIDIA H100 80GB HBM3"}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"schema": SCHEMA, "constants": rates, "provenance": made}))
    simulated, settings = [], []

    def in_process(task, job):
        if task == "machine":
            return {"gpu": made["gpu"], "memory_bytes": 85 * 10**9}
        settings.append(job["arguments"]["cap_bytes"])
        return {"state": "not-run", "reason": "a test"}

    monkeypatch.setattr(cli, "_device", lambda: "cuda")
    monkeypatch.setattr(cli, "_simulate", lambda args, card, host: simulated.append(card.name))
    monkeypatch.setattr(measure_plan, "check_device", lambda device: None)
    monkeypatch.setattr(measure_plan, "_in_process", in_process)
    out = tmp_path / "out"
    assert main(["profile", "--gpu", "12GB", "--constants", str(file), "--output", str(out)]) == 0
    assert simulated == ["calibrated"] and measure_plan._cap_bytes("12GB") in settings
    assert {p.name for p in out.iterdir()} == {"llama-7b_h100-capped-12gb.json", "llama-7b_h100-measured.json"}


@pytest.mark.parametrize("seen", [False, True])
def test_a_gpu_that_torch_does_not_see_measures_nothing(seen: bool, tmp_path, monkeypatch) -> None:
    """The driver may know one where torch is built without CUDA: the simulation is the answer, and no error."""
    asked: list[str] = []
    monkeypatch.setattr(provenance, "gpu", lambda: {"gpu": "NVIDIA GeForce RTX 3090", "driver": "570.1"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(cli, "_simulate", lambda args, card, host: None)
    monkeypatch.setattr(cli, "_measure", lambda args, card: asked.append(card))
    assert main(["profile", "--gpu", "24GB", "--output", str(tmp_path)]) == 0
    assert asked == ["24GB"] * seen


def test_measured_rows_of_other_micro_batches_have_a_file_of_their_own(tmp_path, monkeypatch) -> None:
    """As the simulated ones: the second command is not refused for the first one's settings."""

    def in_process(task, job):
        found = {"gpu": "NVIDIA H100 80GB HBM3", "memory_bytes": 85 * 10**9}
        return found if task == "machine" else {"state": "not-run", "reason": "a test"}

    monkeypatch.setattr(cli, "_device", lambda: "cuda")
    monkeypatch.setattr(cli, "_simulate", lambda args, card, host: None)
    monkeypatch.setattr(measure_plan, "check_device", lambda device: None)
    monkeypatch.setattr(measure_plan, "_in_process", in_process)
    for more in ((), ("--seq", "128"), ("--accumulation", "1,2")):
        assert main(["profile", "--gpu", "24GB", *more, "--output", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        f"llama-7b_h100-{kind}{sizes}.json"
        for kind in ("capped-24gb", "measured")
        for sizes in ("", "_2x128-a1-4-8-16-32", "_2x256-a1-2")
    }


def test_what_cannot_be_measured_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='tpu' is unknown"):
        calibrate(tmp_path / "c.json", "tpu", TINY)
    with pytest.raises(ValueError, match="is a folder"):
        calibrate(tmp_path, "cpu", TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        calibrate(tmp_path / "file" / "c.json", "cpu", TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        calibrate(tmp_path / "c.json", "cuda", TINY)
    assert not list(tmp_path.iterdir())


def test_missing_packages_do_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meft_bench.provenance._PACKAGES", ("torch", "no-such-package"))
    result = calibrate(tmp_path / "c.json", "cpu", TINY)
    assert result["provenance"]["packages"] == {"torch": torch.__version__, "no-such-package": "not installed"}


def test_importing_it_needs_neither_datasets_nor_lm_eval() -> None:
    code = "import sys, meft_bench.profile.calibrate; print([m for m in ('datasets', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
