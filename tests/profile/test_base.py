"""A base that is lent is given back as it was, whatever was attached, and measures what a fresh one measures."""

import copy
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from meft_bench import observe
from meft_bench.meft.engine.workers import RETRIEVAL
from meft_bench.profile import measured, passes, session
from meft_bench.profile.base import _HOOKS, Base
from meft_bench.profile.measured import OutOfMemory, measure_on
from meft_bench.profile.measured_row import measured_row
from meft_bench.profile.passes import Measured, Passes
from meft_bench.profile.session import Session
from meft_bench.profile.variants import KNOWN, ON_A_GPU, make_optimizer
from tests.profile.test_measured import spec
from tests.profile.tiny import SMALL


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(SMALL, "cpu")


def picture(base: Base) -> list[Any]:
    """Modules by name with their hooks, modes and parameters."""
    found: list[Any] = []
    for name, module in base.model.named_modules():
        hooks = {hook: list(getattr(module, hook)) for hook in _HOOKS}
        found.append((name, id(module), module.training, hooks))
    return [*found, *((n, id(p), p.requires_grad, p.grad) for n, p in base.model.named_parameters())]


def on(base: Base, variant: str, **arguments: Any) -> Measured:
    checkpointing = arguments.pop("checkpointing", False)
    wanted = spec(variant, checkpointing=checkpointing)
    return measure_on(base, wanted, **{"steps": 1, "warmup": 1, "accumulations": (2,), **arguments})


@pytest.mark.parametrize(
    "variant", ["meft", "lora_all", "parallel_adapter", "parallel_adapter_host_optimizer_gradients", "meft_no_sparse"]
)
def test_a_base_is_given_back_as_it_was(base: Base, variant: str) -> None:
    before = picture(base)
    weights = copy.deepcopy(base.model.state_dict())
    on(base, variant, checkpointing=variant == "parallel_adapter")
    assert picture(base) == before
    after = base.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[n], weights[n]) for n in weights)


def test_a_base_is_given_back_after_an_error(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    before = picture(base)

    def step(self: Session, accumulation: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", step)
        with pytest.raises(OutOfMemory):
            on(base, "meft")
    assert picture(base) == before
    assert on(base, "meft").step_s[1][0] > 0


def test_a_row_on_a_lent_base_is_that_of_a_fresh_one(base: Base) -> None:
    ours = on(base, "meft_no_sparse")
    fresh = measured.measure(spec("meft_no_sparse"), SMALL, device="cpu", steps=1, warmup=1, accumulations=(2,))
    assert (ours.link_by_purpose, ours.union_by_layer, ours.size) == (
        fresh.link_by_purpose, fresh.union_by_layer, fresh.size
    )  # fmt: skip


def test_keys_that_are_kept_for_later_rows_are_no_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row that draws them takes as much of the host as the next."""
    base = Base(SMALL, "cpu")
    taken = {"uss": 10**9}
    monkeypatch.setattr(passes, "host_bytes", lambda: taken)
    monkeypatch.setattr(Passes, "all", lambda self, *a: self.host_before)
    before = [on(base, "meft") for _ in range(2)]
    keys = base.model.config.num_hidden_layers * spec("meft").neurons * base.model.config.hidden_size * 4
    assert before[0] - 10**9 >= keys and before[1] == 10**9


def test_what_changes_the_base_is_refused(base: Base) -> None:
    for variant in ("full", "qlora", "parallel_adapter_zero2"):
        with pytest.raises(ValueError, match="cannot share one"):
            on(base, variant)


def test_a_short_row_says_what_it_left_out(base: Base) -> None:
    row = measured_row(on(base, "meft", whole=False, later_steps=3, steps=2))
    assert row["time"]["components_s"] == {} and "short row" in row["time"]["components_s_reason"]
    assert row["time"]["steps"] == {"1": 2, "2": 3} and row["traffic"]["h2d_bytes_per_micro_batch"] > 0


def test_a_measurement_can_be_ended_between_steps(base: Base) -> None:
    calls = iter(range(3))

    def go_on() -> None:
        if next(calls, None) is None:
            raise TimeoutError("no time is left")

    with pytest.raises(TimeoutError):
        on(base, "meft", go_on=go_on)


class Threads:
    """Hears in which thread parts of the work are done, and how many are at work at a time."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    @contextmanager
    def during(self, work: observe.Work) -> Iterator[None]:
        if work.kind == "part":
            self.seen.add(threading.get_ident())
        yield


def test_in_the_serialised_pass_nothing_runs_in_the_background(base: Base) -> None:
    """With an engine that overlaps, as on a GPU: every part is heard in the caller's thread, and AdamW is not 0."""
    made = Session(spec("meft"), "cpu")
    made.variant = dataclasses.replace(made.variant, options={"overlap": True})
    with base.lent():
        made.attach(base)
        passes = Passes(made, None)
        free, bound = Threads(), Threads()
        with observe.listening(free):
            made.step(2)
        made.settle()
        seconds = passes.serialised()
        with observe.listening(bound), made.serial():
            made.step(2)
        made.close()
    assert free.seen - {threading.get_ident()}, "the engine does overlap here"
    assert bound.seen == {threading.get_ident()}
    assert all(seconds[part] > 0 for part in ("retrieval", "gather", "gradients", "adam"))


def test_a_host_optimizers_sums_are_made_by_the_caller_in_that_pass(base: Base) -> None:
    made = Session(spec("parallel_adapter_host_optimizer_gradients"), "cpu")
    heard = {True: Threads(), False: Threads()}
    with base.lent():
        made.attach(base)
        optimizer: Any = made.optimizer
        optimizer.queue.turn(True, torch.device("cpu"))  # as on a GPU
        with observe.listening(heard[True]):
            made.step(2)
        with observe.listening(heard[False]), made.serial():
            made.step(2)
        assert optimizer.queue.background
        made.close()
    assert heard[True].seen - {threading.get_ident()} and heard[False].seen == {threading.get_ident()}


def test_what_the_host_has_can_be_said(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine that grows says that little is free."""
    monkeypatch.setattr(session.host_memory, "available_bytes", lambda: 0)
    with pytest.raises(ValueError, match="0.0 GiB are free: .*--host-memory"):
        on(base, "meft")
    assert on(base, "meft", host_bytes=2**30).trainable


@pytest.mark.parametrize("variant", [name for name, v in ON_A_GPU.items() if v.is_meft])
def test_every_setting_of_the_engine_runs_to_a_row(base: Base, variant: str) -> None:
    row = measured_row(on(base, variant))
    assert row["variant"] == variant and row["union"]["union"] > 0
    assert ("device_budget" in row["size"]) == bool(KNOWN[variant].budget)


@pytest.mark.parametrize(("variant", "package"), [("parallel_adapter_torchao", "torchao"),
                                                  ("parallel_adapter_cpu_adam", "deepspeed")])  # fmt: skip
def test_a_peer_that_is_missing_says_how_to_get_it(
    base: Base, variant: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install"):
        on(base, variant)


def test_torchaos_optimizer_is_named_for_what_it_keeps_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, which it drops there for one micro-batch only."""
    asked: dict[str, Any] = {}

    class Fake:
        def __init__(self, parameters: Any, kind: Any, *, offload_gradients: bool = False, **settings: Any) -> None:
            asked.update(offload_gradients=offload_gradients, kind=kind, **settings)

    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(optim=None))
    monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace(CPUOffloadOptimizer=Fake))
    variant, parameter = KNOWN["parallel_adapter_torchao"], torch.nn.Parameter(torch.zeros(1))
    attached: Any = SimpleNamespace(parameters=lambda: [parameter])
    assert isinstance(make_optimizer(variant, attached, simulated=False), Fake)
    assert asked == {"offload_gradients": False, "kind": torch.optim.AdamW, "lr": 1e-4, "weight_decay": 0.0}
    assert variant.title == "Parallel Adapter, optimizer on the host (torchao)"


def test_deepspeeds_adam_steps_the_masters_of_a_host_optimizer(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's AdamW in the place of the package's."""
    made: list[int] = []

    class Fake(torch.optim.AdamW):
        def __init__(self, parameters: Any, adamw_mode: bool, **settings: Any) -> None:
            super().__init__(parameters, **settings)
            made.append(len(list(self.param_groups[0]["params"])))

    adam: Any = ModuleType("deepspeed.ops.adam")
    adam.DeepSpeedCPUAdam = Fake
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", adam)
    row = measured_row(on(base, "parallel_adapter_cpu_adam"))
    assert made == [2 * SMALL.num_hidden_layers] and row["time"]["components_s"]["adam"] > 0


# ---- what the host has left to do when a step returns ----


def overlapping(variant: str) -> Session:
    """With an engine whose host works in the background, as on a GPU."""
    made = Session(spec(variant), "cpu")
    made.variant = dataclasses.replace(made.variant, options={"overlap": True})
    return made


def test_timing_brings_nothing_home_that_a_budget_keeps_on_the_device(base: Base) -> None:
    """What is looked at comes home and leaves only two steps later: the timed ones would be those of another budget."""
    made = overlapping("meft_budget_100")
    with base.lent():
        made.attach(base)
        passes = Passes(made, None)
        passes.watched(1, warmup=2)
        assert made.stores and all(store.away is not None for store in made.stores)
        for times in (lambda: passes.timed(1, 2), passes.serialised):
            times()
            counted = made.linked()
            assert counted is not None and ("d2h", "norm") in counted
            assert not {key for key in counted if key[1] == "moments"}
        made.close()


def test_a_traced_step_ends_when_the_host_is_idle(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends after the optimizer's step would be in the link's count and not in the trace, or the other way."""
    made, busy = overlapping("meft"), []
    real = Session.step

    def step(self: Session, accumulation: int) -> None:
        real(self, accumulation)
        self.stores[-1].queue.submit(time.sleep, 0.1, priority=RETRIEVAL)

    def fake_traced(step: Any) -> str:
        busy.append(idle(made))
        step()
        busy.append(idle(made))
        return "not traced"

    def idle(made: Session) -> bool:
        return all(store.queue.urgency is None for store in made.stores)

    monkeypatch.setattr(Session, "step", step)
    monkeypatch.setattr("meft_bench.profile.passes.traced", fake_traced)
    with base.lent():
        made.attach(base)
        passes = Passes(made, None)
        made.step(1)
        assert not idle(made)
        passes.cuda = True
        passes.traced(1)
        made.close()
    assert busy == [True, True]
