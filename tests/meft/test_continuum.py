"""Every point of device_budget, from the paper's MEFT to a resident adapter: whatever happens on the way (a pass that
is not finished, a second one, a look at parameters, a file), training is that of budget 0."""

import copy
import functools
import gc
import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meft_bench.meft.engine import micro_batch as micro_batch_module
from meft_bench.meft.engine import products, residency
from meft_bench.meft.engine.budget import prices, split
from meft_bench.meft.engine.device_adam import DeviceAdam
from meft_bench.meft.engine.index import KeyIndex
from meft_bench.meft.engine.residency import KeptRows
from meft_bench.meft.engine.slots import Slots
from meft_bench.meft.engine.workers import UPDATE, HostQueue
from meft_bench.meft.model import MeftModel
from meft_bench.meft.routing import Selection
from tests.meft.test_engine import POINTS, budget_for, micro_batch, next_token_loss, tiny_meft
from tests.meft.tiny_models import LAYERS, D, named, tokens

VARIANTS = [{}, {"adam": "lazy"}, {"moments": "bf16"}, {"frozen_keys": True}, {"reading": "union", "gate": "none"}]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def at(point: str, **options) -> MeftModel:
    if point in ("rows alone", "some rows"):
        options.setdefault("retrieval", "host")  # or else keys come first
    return tiny_meft(**options, device_budget=budget_for(point, options))


def steps(meft: MeftModel, optimizer: torch.optim.Optimizer, numbers: range, clear: bool = True) -> list[float]:
    losses = []
    for step in numbers:
        losses += [micro_batch(meft, 2 * step), micro_batch(meft, 2 * step + 1)]
        optimizer.step()
        if clear:
            optimizer.zero_grad()
    return losses


def weights(meft: MeftModel) -> list[Tensor]:
    return [p.detach().clone() for store in meft.stores for p in store.parameters()]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def are_away(meft: MeftModel) -> bool:
    for store in meft.stores:
        store.queue.wait()
    return all(store.away is not None for store in meft.stores)


# ---- what happens on the way ----


def an_early_stop(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    meft.model(tokens(seed=90))
    gc.collect()


def a_skipped_step(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    micro_batch(meft, 91)
    optimizer.zero_grad()


def a_second_pass(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    ids = tokens(seed=92)
    loss = next_token_loss(meft.model(ids), ids)
    loss.backward(retain_graph=True)
    loss.backward()


def an_old_graph(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    ids = tokens(seed=93)
    early = next_token_loss(meft.model(ids), ids)
    steps(meft, optimizer, range(40, 41))
    early.backward()


def a_step_without_new_gradients(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    steps(meft, optimizer, range(41, 42), clear=False)
    optimizer.step()  # with the same ones
    optimizer.zero_grad()
    optimizer.step()  # with none


def a_step_before_the_next_forward_pass(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()  # what the step before has sent was not taken yet
    optimizer.zero_grad()


def a_look_after_a_step(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    for store in meft.stores:
        assert store.values.grad is not None


def steps_without_clearing(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    steps(meft, optimizer, range(44, 46), clear=False)
    optimizer.step()
    for store in meft.stores:
        assert store.values.grad is not None  # brings home what the last step has used
    optimizer.step()
    optimizer.zero_grad()


def a_graph_of_evaluation(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Made while rows come and go in their slots, and used when they are held."""
    for store in meft.stores:
        assert store.values.grad is not None
    meft.model.eval()
    ids = tokens(seed=96)
    early = next_token_loss(meft.model(ids), ids)
    meft.model.train()
    steps(meft, optimizer, range(46, 49))
    early.backward()


def cleared_between_the_passes(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Rows go to the device while a graph reads them."""
    for store in meft.stores:
        assert store.values.grad is not None
    for seed in range(3):
        ids = tokens(seed=97 + seed)
        loss = next_token_loss(meft.model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def a_look_at_gradients(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    micro_batch(meft, 94)
    for store in meft.stores:
        for parameter in store.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def a_write(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    micro_batch(meft, 95)
    with torch.no_grad():
        for store in meft.stores:
            store.values.mul_(1.5)


def other_betas(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.1, lr=2e-2)


def another_optimizer(meft: MeftModel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    other = meft.make_optimizer(lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    return other


def no_gradient_at_all(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()


def checkpointed(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    meft.model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for layer in meft.model.layers:
        inner = layer.forward
        layer.forward = lambda h, inner=inner: checkpoint(inner, h, use_reentrant=False)


def a_step_skipped_for_gradients_that_are_no_numbers(meft: MeftModel, optimizer: torch.optim.Optimizer) -> None:
    ids = tokens(seed=97)
    (next_token_loss(meft.model(ids), ids) * math.inf).backward()
    assert not all(store.values.grad.isfinite().all() for store in meft.stores)
    optimizer.zero_grad()


EVENTS = [
    an_early_stop, a_skipped_step, a_second_pass, an_old_graph, a_step_without_new_gradients, a_look_at_gradients,
    a_step_before_the_next_forward_pass, a_look_after_a_step, a_graph_of_evaluation, cleared_between_the_passes,
    a_write, other_betas, a_step_skipped_for_gradients_that_are_no_numbers,
    another_optimizer, no_gradient_at_all, checkpointed,
]  # fmt: skip


def eventful(event, meft: MeftModel) -> tuple[list[float], list[Tensor]]:
    optimizer = meft.make_optimizer(lr=1e-2)
    losses = steps(meft, optimizer, range(3))
    optimizer = event(meft, optimizer) or optimizer
    losses += steps(meft, optimizer, range(3, 6))
    return losses, weights(meft)


@functools.cache
def at_budget_0(event) -> tuple[list[float], list[Tensor]]:
    return eventful(event, tiny_meft(**about(event)))


def about(event) -> dict:
    # A backward pass after a step reads the router as it is then, where it was renewed: that is no question of rows.
    return {"gate": "none"} if event in (an_old_graph, a_graph_of_evaluation) else {}


@pytest.mark.parametrize("point, overlap", [("keys and some rows", True), ("some rows", False), ("everything", True)])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_whatever_happens_training_goes_on_as_at_budget_0(event, point: str, overlap: bool) -> None:
    got, ours = eventful(event, at(point, overlap=overlap, **about(event)))
    wanted, theirs = at_budget_0(event)
    # What was looked at, or had to go home for a write, is no part of the sum that adds up on the device.
    if event in (a_look_at_gradients, a_write):
        assert got == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    else:
        assert got == wanted
        assert_equal(ours, theirs)


# ---- rows that are used in their slots ----


@pytest.fixture
def used_in_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products are dense, as on a GPU; the places of each loan that is used where its rows lie."""
    seen: list[int] = []

    def counted(*given, inner=residency.InPlace) -> residency.InPlace:
        made = inner(*given)
        seen.append(made.where_U.shape[0])
        return made

    for module in (products, residency, micro_batch_module):
        monkeypatch.setattr(module, "always_dense", lambda device, dtype: True)
    monkeypatch.setattr(residency, "InPlace", counted)
    return seen


@pytest.mark.parametrize("point", ["keys and some rows", "some rows"])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_rows_used_in_their_slots_are_trained_as_at_budget_0(event, point: str, used_in_place: list[int]) -> None:
    """To rounding, as a sum over rows in another order is another sum."""
    got, ours = eventful(event, at(point, **about(event)))
    assert len(used_in_place) > 2 * LAYERS, "rows are held after a step, and in most unions"
    wanted, theirs = eventful(event, tiny_meft(**about(event)))
    assert got == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [*VARIANTS[1:4], {"gate": "softmax"}, {"activation": "silu", "selection": "signed"}], ids=named
)
@pytest.mark.parametrize("point", ["keys and some rows", "some rows"])
def test_rows_used_in_their_slots_train_every_variant(options: dict, point: str, used_in_place: list[int]) -> None:
    got, wanted = [], []
    for results, meft in ((got, at(point, **options)), (wanted, tiny_meft(**options))):
        results += steps(meft, meft.make_optimizer(lr=1e-2), range(5))
    assert used_in_place
    assert got == pytest.approx(wanted, rel=2e-3 if options.get("moments") == "bf16" else 1e-5)


def test_rows_are_used_in_place_in_the_model_s_dtype_alone() -> None:
    """The wire's stays bf16 when the model's changes: in fp16 and fp32 rows are cast first."""
    meft = tiny_meft(wire="bf16", device_budget=budget_for("some rows", {}) // 2, retrieval="host")
    optimizer = meft.make_optimizer(lr=1e-2)
    for number, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)):
        meft.model.to(dtype)
        assert all(math.isfinite(loss) for loss in steps(meft, optimizer, range(2 * number, 2 * number + 2)))
        assert all(a.residency.may_be_in_place == (dtype == torch.bfloat16) for a in meft.adapters)


@pytest.mark.parametrize("point", ["keys", "keys and some rows"])
@pytest.mark.parametrize("options", [{}, {"reading": "union", "gate": "none"}], ids=named)
def test_keys_on_the_device_are_cast_to_the_model_s_dtype(options: dict, point: str) -> None:
    meft = tiny_meft(wire="bf16", device_budget=budget_for(point, options), **options)
    meft.model.to(torch.float16)
    assert all(math.isfinite(loss) for loss in steps(meft, meft.make_optimizer(lr=1e-2), range(2)))


def test_a_micro_batch_that_uses_few_slots_gathers_its_rows(
    used_in_place: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with rows that no token keeps would cost more. Of five slots it uses four, and then three."""
    meft = at("some rows")
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(2))
    assert are_away(meft)
    rows = meft.adapters[0].residency
    assert isinstance(rows, KeptRows) and rows.adam is not None
    for used, in_place in ((4, True), (3, False)):
        loan = rows.lend(rows.adam.numbers_M[:used], training=True)
        assert (loan.in_place is not None) == in_place
        loan.release(loan.arrived())
    union_U = rows.adam.numbers_M[:4]
    assert rows.lend(union_U, training=False).in_place is None, "nobody pins what evaluation reads"
    assert rows.lend(union_U, training=True, counted=torch.tensor([1])).in_place is None


def test_no_work_of_a_step_is_as_urgent_as_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a layer that the next forward pass waits for comes after the AdamW of all others, whatever it waits for."""
    meft = at("keys and some rows")
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(3))
    given: list[tuple[str, int]] = []

    def submit(self, work, *args, priority, inner=HostQueue.submit):
        given.append((work.__qualname__, priority))
        return inner(self, work, *args, priority=priority)

    monkeypatch.setattr(HostQueue, "submit", submit)
    optimizer.step()
    optimizer.zero_grad()
    assert {name for name, _ in given} >= {"StoreUpdates.step", "DeviceAdam.take", "DeviceAdam.drop"}
    assert min(priority for _, priority in given) >= UPDATE


@pytest.mark.parametrize("point", ["some rows", "keys and some rows", "everything"])
@pytest.mark.parametrize("options", [{"adam": "lazy"}, {"adam": "lazy", "moments": "bf16", "gate": "none"}], ids=named)
def test_lazy_rows_are_stepped_once_for_each_gradient(options: dict, point: str) -> None:
    """Two steps without zero_grad in between, and a look between them."""
    fields = {**options, "retrieval": "host"} if point == "everything" else options
    got, ours = eventful(steps_without_clearing, at(point, **fields))
    wanted, theirs = eventful(steps_without_clearing, tiny_meft(**fields))
    assert got == wanted
    assert_equal(ours, theirs)


@pytest.mark.parametrize("point", ["some rows", "keys and some rows", "everything"])
def test_what_comes_home_comes_whole_or_not_at_all(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted on its way, and looked at again."""

    def run(meft: MeftModel, interrupted: bool) -> list[Tensor]:
        optimizer = meft.make_optimizer(lr=1e-2)
        steps(meft, optimizer, range(3))
        if interrupted:
            sent, count = meft.link.to_host, itertools.count()

            def to_host(source: Tensor, purpose: str, *more: object) -> Tensor:
                if purpose == "moments" and next(count) == 4:
                    raise KeyboardInterrupt
                return sent(source, purpose, *more)

            with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
                broken.setattr(meft.link, "to_host", to_host)
                optimizer.settle()
        steps(meft, optimizer, range(3, 5))
        return weights(meft)

    assert_equal(run(at(point), True), run(tiny_meft(), False))


@pytest.mark.parametrize(
    "point, owner, lacks",
    [("some rows", DeviceAdam, "_send"), ("everything", DeviceAdam, "_send"), ("keys and some rows", KeyIndex, "hold"),
     ("keys and some rows", KeptRows, "hold")],
)  # fmt: skip
def test_a_device_without_room_leaves_the_optimizer_on_the_host(
    point: str, owner: type, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For moments, for keys or for rows."""
    meft, plain = at(point), tiny_meft()
    optimizer, theirs = (model.make_optimizer(lr=1e-2) for model in (meft, plain))
    with monkeypatch.context() as full:
        full.setattr(owner, lacks, no_room)
        losses = steps(meft, optimizer, range(3))
        assert not are_away(meft)
    assert losses + steps(meft, optimizer, range(3, 6)) == steps(plain, theirs, range(6))
    assert are_away(meft), "tried again at the next zero_grad"
    assert_equal(weights(meft), weights(plain))


def no_room(*given: object) -> Tensor:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("point", ["some rows", "keys and some rows", "everything"])
def test_a_graph_survives_a_pass_in_another_dtype(point: str) -> None:
    """Its gradients find home although all that lies on the device was made anew. (A router there would be narrow.)"""

    def run(meft: MeftModel) -> list[Tensor]:
        steps(meft, meft.make_optimizer(lr=1e-2), range(2))
        ids = tokens(seed=5)
        loss = next_token_loss(meft.model(ids), ids)
        with torch.no_grad():
            for adapter in meft.adapters:
                adapter(torch.ones(1, 3, D, dtype=torch.bfloat16))
        loss.backward()
        return [p.grad.clone() for store in meft.stores for p in (store.keys, store.values)]

    for got, wanted in zip(run(at(point, gate="none")), run(tiny_meft(gate="none")), strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options, point", [({}, "keys and some rows"), *((o, "some rows") for o in VARIANTS)], ids=str)
def test_a_step_that_fails_in_the_middle_of_a_window_costs_nothing(options: dict, point: str) -> None:
    """An exception in the loss of the second micro-batch; the first one's gradients count."""

    def run(meft: MeftModel) -> list[Tensor]:
        optimizer = meft.make_optimizer(lr=1e-2)
        steps(meft, optimizer, range(3))
        micro_batch(meft, 60)
        with pytest.raises(ZeroDivisionError):
            meft.model(tokens(seed=61)).sum() / (1 // 0)
        steps(meft, optimizer, range(3, 5))
        return weights(meft)

    assert_equal(run(at(point, **options)), run(tiny_meft(**options)))


# ---- files and copies ----


@pytest.mark.parametrize(
    "options, point", [({}, "rows alone"), ({}, "keys and some rows"), *((o, "some rows") for o in VARIANTS)], ids=str
)
def test_eight_steps_are_four_saved_and_resumed_and_four(options: dict, point: str) -> None:
    """Saved between step and zero_grad, and resumed at another point of the budget."""
    straight = tiny_meft(**options)
    losses = steps(straight, straight.make_optimizer(lr=1e-2), range(8))

    first = at(point, **options)
    optimizer = first.make_optimizer(lr=1e-2)
    begun = steps(first, optimizer, range(3))
    begun += steps(first, optimizer, range(3, 4), clear=False)
    model = {n: t.clone() for n, t in first.model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    assert begun + steps(first, optimizer, range(4, 8)) == losses, "saving changes nothing"

    second = at("everything" if point == "rows alone" else "rows alone", **options)
    second.model.load_state_dict(model)
    optimizer = second.make_optimizer(lr=1e-2)
    optimizer.load_state_dict(state)
    assert begun + steps(second, optimizer, range(4, 8)) == losses
    assert_equal(weights(second), weights(straight))


@pytest.mark.parametrize("point", ["some rows", "keys and some rows", "everything"])
def test_a_copy_of_the_model_has_what_the_device_has(point: str) -> None:
    meft, plain = at(point), tiny_meft()
    for model in (meft, plain):
        steps(model, model.make_optimizer(lr=1e-2), range(3))
    copied = copy.deepcopy(meft.model)
    got = [p for p in copied.parameters() if p.requires_grad]
    assert_equal([p.detach() for p in got], weights(plain))
    ids = tokens(seed=5)
    assert torch.equal(copied(ids), plain.model(ids)), "and it runs"


# ---- bytes ----


def window(meft: MeftModel, optimizer: torch.optim.Optimizer, seed: int) -> tuple[Counter, int, int]:
    """(bytes of one window of two micro-batches and its step, by direction and purpose; kept places; all U)."""
    before = Counter(meft.link.bytes)
    for micro in range(2):
        micro_batch(meft, seed + micro)
    meft.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    for store in meft.stores:
        store.queue.wait()
    used = sum(u for adapter in meft.adapters for _, u in adapter.usage)
    return Counter(meft.link.bytes) - before, 2 * LAYERS * 12 * meft.config.kept, used


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"gate": "none"}, {"frozen_keys": True}, {"adam": "lazy"}], ids=named)
def test_at_everything_only_what_selects_crosses(options: dict, overlap: bool) -> None:
    """The host selects, so hidden states, indices and what it selects with cross, and for clipping one number."""
    meft = at("everything", **options, overlap=overlap, retrieval="host")
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(2))
    assert are_away(meft)
    for adapter in meft.adapters:
        adapter.usage.clear()
    crossed, places, used = window(meft, optimizer, 20)
    config, router = meft.config, meft.config.trains_router
    assert crossed == {
        ("d2h", "hidden"): 2 * LAYERS * 12 * D * 4,
        # A union, each kept neuron's place in it, and with gates its expert: int32.
        ("h2d", "index"): 4 * (used + places * (2 if router else 1)),
        # With a router on the device each token's experts, int32, and their gates.
        **({way: 2 * LAYERS * 12 * 2 * 4 for way in (("d2h", "index"), ("d2h", "score"))} if router else {}),
        ("d2h", "norm"): 8,
        **({} if options.get("frozen_keys") else {("d2h", "keys"): LAYERS * config.neurons * D * 4}),
        # The experts of each token, and their scores, are found where the router is.
        **({("d2h", name): 2 * LAYERS * 12 * 2 * 4 for name in ("index", "score")} if router else {}),
    }


def test_at_everything_no_host_memory_is_updated() -> None:
    """The host's books say that these rows are elsewhere, and its AdamW touches none."""
    meft = at("everything")
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(2))
    before = [store._rows_R2D[:, 1].clone() for store in meft.stores]
    steps(meft, optimizer, range(2, 4))
    assert_equal([store._rows_R2D[:, 1] for store in meft.stores], before)
    assert not torch.equal(meft.stores[0].values.detach(), before[0]), "until somebody looks"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_the_device_holds_what_was_bought(options: dict, point: str) -> None:
    meft = at(point, **options)
    steps(meft, meft.make_optimizer(lr=1e-2), range(2))
    assert meft.device_bytes == split(meft.config, LAYERS, D, torch.float32).nbytes == meft.config.device_budget


@pytest.mark.parametrize("point", ["some rows", "keys and some rows"])
def test_the_rows_used_most_are_held_once_their_use_is_known(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After four micro-batches here, in the second window's zero_grad."""
    monkeypatch.setattr(Slots, "known_after", 4)
    meft = at(point)
    uses = [torch.zeros(24) for _ in meft.adapters]
    for counts, adapter in zip(uses, meft.adapters, strict=True):
        adapter.on_select = functools.partial(count, counts)
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(1))
    assert not are_away(meft)
    steps(meft, optimizer, range(1, 2))
    assert are_away(meft)
    for counts, adapter in zip(uses, meft.adapters, strict=True):
        rows = adapter.residency
        assert isinstance(rows, KeptRows) and rows.adam is not None
        held = rows.adam.numbers_M
        assert held.unique().numel() == rows.capacity == 5
        left_out = torch.ones(24, dtype=torch.bool).index_fill_(0, held, False)
        assert counts[held].min() >= counts[left_out].max()


def count(counts: Tensor, h_TD: Tensor, chosen: Selection) -> Selection:
    counts[chosen.union_U] += 1
    return chosen


def test_held_rows_neither_cross_nor_make_room() -> None:
    """What passes is the rest of each union: rows down, and their gradients up."""
    meft = at("some rows")
    optimizer = meft.make_optimizer(lr=1e-2)
    steps(meft, optimizer, range(2))
    held = [adapter.residency.adam.numbers_M for adapter in meft.adapters]
    passing: list[int] = []
    for adapter, rows in zip(meft.adapters, held, strict=True):
        adapter.on_select = functools.partial(count_others, passing, rows)
    before = Counter(meft.link.bytes)
    steps(meft, optimizer, range(2, 5))
    assert are_away(meft)
    crossed = Counter(meft.link.bytes) - before
    assert crossed["h2d", "rows"] == crossed["d2h", "grads"] == sum(passing) * 2 * D * 4 > 0
    assert ("h2d", "moments") not in crossed and crossed["d2h", "keys"] == 3 * LAYERS * 5 * D * 4
    assert_equal([adapter.residency.adam.numbers_M for adapter in meft.adapters], held)


def count_others(passing: list[int], rows: Tensor, h_TD: Tensor, chosen: Selection) -> Selection:
    passing.append(int((~torch.isin(chosen.union_U, rows)).sum()))
    return chosen


def test_a_loop_that_always_looks_moves_the_optimizer_only_once() -> None:
    """Weights and moments do not cross back and forth in every step of it."""
    meft = at("everything")
    optimizer = meft.make_optimizer(lr=1e-2)
    for step in range(6):
        micro_batch(meft, step)
        torch.nn.utils.clip_grad_norm_([p for s in meft.stores for p in s.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert meft.link.bytes["h2d", "moments"] == 0
    price = prices(meft.config, D, torch.float32)
    once = LAYERS * (price.router_moments + 24 * price.moments)
    steps(meft, optimizer, range(6, 9))
    assert are_away(meft) and meft.link.bytes["h2d", "moments"] == once
    optimizer.state_dict()
    assert not are_away(meft) and meft.link.bytes["d2h", "moments"] == once
