"""The three counts of transfers: parsing, wrapping, bounds, and what a link leaves out, against the simulation."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch.profiler import ProfilerActivity

from meft_bench.meft.config import MeftOptions
from meft_bench.profile import counters, simulated
from meft_bench.profile.counters import (
    Memcpy,
    Nvml,
    PcieMeter,
    Trace,
    compare_link,
    compare_nvml,
    compared,
    copied_bytes,
    read_trace,
    traced,
)
from meft_bench.profile.session import Session
from meft_bench.profile.spec import ProfileSpec, Union
from tests.profile.tiny import LAYERS, SMALL


def event(category: str, name: str, start: float, duration: float, **args) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": args}


def test_a_trace_gives_copies_and_busy_time() -> None:
    trace = read_trace(
        {
            "traceEvents": [
                event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 10, bytes=4096),
                event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 10, 5, bytes=100),
                event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 20, 3, bytes=4),
                event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 30, 1, bytes=7000),
                event("kernel", "a", 100, 50),
                event("kernel", "b on another stream", 120, 40),
                event("gpu_memset", "Memset (Device)", 170, 10),
                event("cuda_runtime", "cudaMemcpyAsync", 0, 999),
                {"ph": "M", "name": "process_name"},
            ]
        }
    )
    assert trace.copies == [
        Memcpy("h2d", "pinned", 4096, 10e-6),
        Memcpy("h2d", "pageable", 100, 5e-6),
        Memcpy("d2h", "pageable", 4, 3e-6),
    ]
    assert copied_bytes(trace.copies) == {"h2d": 4196, "d2h": 4}
    assert trace.busy_s == pytest.approx(70e-6)  # 100 to 160, and 170 to 180


def test_a_copy_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say how many bytes"):
        read_trace({"traceEvents": [event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 0, 1)]})


# ---- NVML ----


class FakeNvml:
    """The part of pynvml that is used; fields are (value type, value, return code)."""

    NVML_SUCCESS = 0
    NVML_VALUE_TYPE_UNSIGNED_INT, NVML_VALUE_TYPE_UNSIGNED_LONG, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 1, 2, 3

    def __init__(self) -> None:
        self.processes: list = []
        self.readings: list[tuple[tuple, tuple]] = []
        self.uuid = ""

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuid = uuid
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list:
        return self.processes

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list:
        assert fields == [197, 198]
        made = []
        for kind, value, code in self.readings.pop(0):
            numbers = SimpleNamespace(uiVal=value, ulVal=value, ullVal=value)
            made.append(SimpleNamespace(valueType=kind, nvmlReturn=code, value=numbers))
        return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    made = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def test_counters_are_added_up_over_a_wrap(fake: FakeNvml) -> None:
    # (transmitted, received): a 32-bit counter that begins again, and one that does not.
    fake.readings = [((1, 2**32 - 10, 0), (3, 100, 0)), ((1, 20, 0), (3, 150, 0)), ((1, 25, 0), (3, 160, 0))]
    meter = PcieMeter(Nvml("x"))
    assert fake.uuid == "GPU-x"
    meter.start()
    meter.read()
    meter.read()
    assert meter.figures() == {"h2d": 60, "d2h": 35}


@pytest.mark.parametrize(
    ("readings", "reason"),
    [
        ([((1, 0, 3), (1, 0, 3))], "field 197: code 3"),
        ([((0, 0, 0), (0, 0, 0))], "unknown type 0"),
        ([((1, 5, 0), (1, 5, 0))] * 2, "did not move"),
    ],
)
def test_counters_that_do_not_answer_give_a_reason(fake: FakeNvml, readings: list, reason: str) -> None:
    fake.readings = readings
    meter = PcieMeter(Nvml("x"))
    meter.start()
    if fake.readings:
        meter.read()
    figures = meter.figures()
    assert isinstance(figures, str) and reason in figures


def test_memory_of_this_process_only(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 7)
    nvml = Nvml("x")
    assert "no process of this number" in str(nvml.process_bytes())
    fake.processes = [SimpleNamespace(pid=8, usedGpuMemory=1), SimpleNamespace(pid=7, usedGpuMemory=2**30)]
    assert nvml.process_bytes() == 2**30
    fake.processes = [SimpleNamespace(pid=7, usedGpuMemory=None)]
    assert "does not tell" in str(nvml.process_bytes())


def test_nvml_missing_or_broken_is_a_reason(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Driver Not Loaded\nmore")

    monkeypatch.setattr(fake, "nvmlInit", fails)
    broken = Nvml("x")
    assert broken.process_bytes() == broken.pcie() == "NVML does not answer (Driver Not Loaded)"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in str(Nvml("x").process_bytes())


# ---- side by side ----

COPIES = [Memcpy("h2d", "pageable", 1000, 0.0), Memcpy("h2d", "pageable", 96, 0.0), Memcpy("d2h", "pageable", 500, 0.0),
          Memcpy("d2h", "pageable", 4, 0.0)]  # fmt: skip
LINK = {("h2d", "rows"): 900, ("h2d", "index"): 100, ("d2h", "grads"): 500}


def test_link_and_kineto_agree_when_all_is_explained() -> None:
    result = compare_link(LINK, COPIES, {"h2d": {"token ids": 96}, "d2h": {}})
    assert result["h2d"] == {"link_bytes": 1000, "kineto_bytes": 1096, "difference_bytes": 96,
                             "explained_bytes": {"token ids": 96}, "unexplained_bytes": 0, "agrees": True}  # fmt: skip
    assert result["d2h"]["explained_bytes"] == {"scalars": 4} and result["d2h"]["agrees"]


def test_a_byte_unexplained_is_no_agreement() -> None:
    result = compare_link({**LINK, ("h2d", "rows"): 899}, COPIES, {"h2d": {"token ids": 96}})
    assert result["h2d"]["unexplained_bytes"] == 1 and not result["h2d"]["agrees"] and result["d2h"]["agrees"]


@pytest.mark.parametrize(("seen", "within"), [(97e9, False), (99e9, True), (125e9, True), (131e9, False)])
def test_nvml_lies_within_its_bound(seen: float, within: bool) -> None:
    result = compare_nvml({"h2d": 10**11, "d2h": 0}, {"h2d": round(seen), "d2h": 10**6})
    assert result["h2d"]["within"] is within and result["d2h"]["within"]


def test_each_missing_count_has_its_own_reason() -> None:
    block = compared(None, Trace(COPIES, 1.0), {}, None, "no counters")
    assert block["kineto"]["h2d pageable"] == {"copies": 2, "bytes": 1096, "seconds": 0.0}
    assert "no link" in block["link_and_kineto_reason"] and block["nvml_reason"] == "no counters"
    block = compared(LINK, "no CUPTI", {}, {"h2d": 1, "d2h": 1}, {"h2d": 1, "d2h": 1})
    assert block["kineto"] is block["link_and_kineto"] is None and block["kineto_reason"] == "no CUPTI"
    assert block["nvml"]["h2d"]["within"]


@pytest.mark.parametrize("variant", ["meft", "meft_union", "meft_union_no_ke", "meft_no_sparse"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_link_leaves_out_is_known_to_the_byte(variant: str, checkpointing: bool) -> None:
    """Every copy that the simulation sees in a step, in place of Kineto's."""
    neurons, rows = 128, 100
    spec = ProfileSpec(model="small", variant=variant, neurons=neurons, checkpointing=checkpointing, batch=2, seq=24,
                       accumulation=2, union=Union(rows=rows, source="test", evidence="assumed"))  # fmt: skip
    run = simulated.simulate_layers(spec, SMALL, LAYERS)
    copies = [Memcpy(o.place, "any", o.bytes, 0.0) for o in run.operations if o.place in ("h2d", "d2h")]
    session = Session(spec, "cpu")
    moved = neurons if variant == "meft_no_sparse" else rows
    session.attached = SimpleNamespace(usage=[[(spec.tokens, moved)] * 2] * LAYERS)  # type: ignore[assignment]
    session.size = {**MeftOptions(neurons=neurons, kept=16).to_dict(), **session.variant.options}
    result = compare_link(run.link, copies, session.uncounted(2))
    assert result["h2d"]["agrees"] and result["d2h"]["agrees"], result
    assert result["d2h"]["explained_bytes"]["scalars"] < 1000 < result["d2h"]["link_bytes"]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUPTI_ERROR_OUT_OF_MEMORY\nmore"), ValueError("no bytes"), OSError("full")]
)
def test_a_trace_that_fails_is_a_reason_and_not_the_end_of_the_row(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile(**_: object) -> None:
        raise error

    monkeypatch.setattr(counters.torch.profiler, "supported_activities", lambda: {ProfilerActivity.CUDA})
    monkeypatch.setattr(counters.torch.profiler, "profile", profile)
    assert traced(lambda: None) == f"Kineto gave no trace ({str(error).splitlines()[0]})"


def test_cupti_stays_between_two_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kineto reads it from the environment when a profile ends."""
    seen: list[str | None] = []

    def profile(activities: Any) -> Any:
        seen.append(os.environ.get("TEARDOWN_CUPTI"))
        raise RuntimeError("no GPU here")

    monkeypatch.setenv("TEARDOWN_CUPTI", "1")
    monkeypatch.setattr(counters.torch.profiler, "supported_activities", lambda: {ProfilerActivity.CUDA})
    monkeypatch.setattr(counters.torch.profiler, "profile", profile)
    assert traced(lambda: None) == "Kineto gave no trace (no GPU here)" and seen == ["0"]
