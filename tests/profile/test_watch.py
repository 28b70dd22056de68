"""Seconds by part, and peaks by phase, with made-up clocks and counters."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft_bench import observe
from meft_bench.meft.sites import ADAPTER_NAME, decoder_layers
from meft_bench.profile import shapes
from meft_bench.profile.counters import PcieMeter
from meft_bench.profile.variants import VARIANTS, attach, make_optimizer
from meft_bench.profile.watch import Clock, Peaks, accounted, host_bytes
from tests.profile.tiny import LAYERS, SMALL


class Host:
    """Work that takes made-up seconds and announces itself."""

    def __init__(self) -> None:
        self.time = 0.0

    def work(self, seconds: float) -> None:
        self.time += seconds

    @observe.announced("adam")
    def outer(self, seconds: float) -> str:
        self.work(seconds)
        self.inner(2 * seconds)
        self.work(seconds)
        return "out"

    def inner(self, seconds: float) -> None:
        with observe.copy("rows", "h2d" if seconds > 5 else "d2h", 1):
            self.work(seconds)


def part_of(work: observe.Work) -> str | None:
    return {"part": work.name, "copy": work.direction}.get(work.kind)


def test_parts_are_exclusive_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    host, waits = Host(), []
    monkeypatch.setattr("time.perf_counter", lambda: host.time)
    clock = Clock(lambda: waits.append(host.time), part_of)
    with clock.running():
        host.work(1)
        assert host.outer(3) == "out"
        host.inner(4)
        with observe.phase("update"):  # no part
            host.work(2)
    assert dict(clock.seconds) == {"rest": 3, "adam": 6, "h2d": 6, "d2h": 4}
    assert len(waits) == 8  # each change of part waits for the device
    host.outer(3)
    assert sum(clock.seconds.values()) == 19, "nobody listens any more"


def test_parts_of_several_threads_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that a thread left open goes on counting when one that began later has ended, in whatever order."""
    host = Host()
    monkeypatch.setattr("time.perf_counter", lambda: host.time)
    clock = Clock(lambda: None, part_of)
    begun, end = threading.Event(), threading.Event()

    def gather() -> None:
        with observe.part("gather"):
            begun.set()
            assert end.wait(10)

    with clock.running():
        other = threading.Thread(target=gather)
        other.start()
        assert begun.wait(10)
        host.work(1)
        with observe.part("retrieval"):
            host.work(2)
            end.set()
            other.join()
            host.work(4)
        host.work(8)
    assert dict(clock.seconds) == {"gather": 1, "retrieval": 6, "rest": 8}


def test_an_exception_leaves_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    monkeypatch.setattr("time.perf_counter", lambda: host.time)
    clock = Clock(lambda: None, part_of)
    with clock.running():
        with pytest.raises(TypeError):
            host.outer("three")  # type: ignore[arg-type]
        host.work(3)
    assert dict(clock.seconds) == {"rest": 3, "adam": 0}


def test_peaks_are_those_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"peak": 0, "resets": 0}
    fakes = {
        "reset_peak_memory_stats": lambda: state.update(peak=0, resets=state["resets"] + 1),
        "max_memory_allocated": lambda: state["peak"],
        "max_memory_reserved": lambda: 2 * state["peak"],
        "mem_get_info": lambda: (1000 - state["peak"] - 300, 1000),
        "host_memory_stats": lambda: {"active_bytes.current": 64},
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    answers = iter([50, "gone"])
    nvml: Any = SimpleNamespace(process_bytes=lambda: next(answers), pcie=lambda: "none")
    peaks = Peaks(True, nvml, PcieMeter(nvml))
    for phase, peak in (("forward", 100), ("backward", 70)):
        with observe.listening(peaks), observe.phase(phase), observe.part("adam"):
            state["peak"] = peak
    assert peaks.device["forward"] == {"allocated": 100, "reserved": 200, "used": 400, "process": 50}
    assert peaks.device["backward"] == {"allocated": 70, "reserved": 140, "used": 370}
    assert peaks.process_reason == "gone" and peaks.now == "backward"
    assert peaks.host["forward"]["pinned"] == 64 and peaks.host["forward"]["uss"] > 0
    monkeypatch.setattr(nvml, "process_bytes", lambda: 10)
    with observe.listening(peaks), observe.phase("forward"):  # the second micro-batch of the step is smaller
        state["peak"] = 90
    assert peaks.device["forward"] == {"allocated": 100, "reserved": 200, "used": 400, "process": 50}
    assert state["resets"] == 3


@pytest.mark.parametrize("name", ["parallel_adapter", "meft", "parallel_adapter_host_optimizer", "full"])
def test_accounted_bytes(name: str) -> None:
    variant, neurons = VARIANTS[name], 64
    model = shapes.build(SMALL, "cpu", torch.bfloat16, random=True)
    base = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    options = {"neurons": neurons, **({"kept": 8} if variant.is_meft else {})} if variant.option else {}
    attached = attach(variant, options, model, simulated=False)
    optimizer = make_optimizer(variant, attached, simulated=False)
    for parameter in attached.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    trained = sum(p.numel() for p in attached.parameters())
    tensors = len(attached.parameters())
    found = accounted(model, attached, optimizer, full=name == "full")
    steps = 4 * tensors  # each parameter's step count
    expected = {
        "parallel_adapter": (
            {"base weights": base, "adapter parameters": 4 * trained, "moments": 8 * trained + steps},
            {},
        ),
        "meft": (
            {"base weights": base},
            {"adapter parameters": 4 * trained, "gradients": 4 * trained, "moments": 8 * trained + steps},
        ),
        "parallel_adapter_host_optimizer": (
            {"base weights": base, "adapter parameters": 2 * trained},
            {"adapter parameters": 4 * trained, "moments": 8 * trained},
        ),
        "full": ({"base weights": base, "moments": 4 * trained + steps}, {}),
    }[name]  # fmt: skip
    assert (found["device"], found["host"]) == expected
    assert name != "meft" or all(hasattr(layer, ADAPTER_NAME) for layer in decoder_layers(model)[:LAYERS])


class _AsTorchao(torch.optim.Optimizer):
    """torchao's CPUOffloadOptimizer as far as its bytes go: it never calls Optimizer.__init__, and so has no state."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_d2h_map = {p: p.detach().clone() for p in parameters}
        self.optim_dict = {}
        for p, host in self.param_d2h_map.items():
            host.grad = torch.zeros_like(host)
            self.optim_dict[p] = torch.optim.AdamW([host])
            self.optim_dict[p].step()


def test_bytes_of_an_optimizer_of_torchao() -> None:
    model = shapes.build(SMALL, "cpu", torch.bfloat16, random=True)
    attached = attach(VARIANTS["parallel_adapter"], {"neurons": 64}, model, simulated=False)
    found = accounted(model, attached, _AsTorchao(attached.parameters()), full=False)
    trained, steps = sum(p.numel() for p in attached.parameters()), 4 * len(attached.parameters())
    assert found["device"]["adapter parameters"] == 4 * trained and "moments" not in found["device"]
    assert found["host"] == {
        "adapter parameters": 4 * trained, "gradients": 4 * trained, "moments": 8 * trained + steps
    }  # fmt: skip


def test_a_system_that_hides_what_is_a_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil then gives what memory_info() has; some sandboxes have no /proc/self/smaps."""
    monkeypatch.setattr("psutil.Process.memory_full_info", lambda self: SimpleNamespace(rss=7, vms=9))
    assert host_bytes() == {"rss": 7, "uss": 7}
