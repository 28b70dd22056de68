"""Rows kept on the device: what is pinned stays, what is used least goes, and every byte is counted."""

import pytest
import torch
from torch import Tensor

from meft_bench.meft.adam import DenseRowAdamW
from meft_bench.meft.engine import residency
from meft_bench.meft.engine.budget import prices
from meft_bench.meft.engine.residency import KeptLoan, KeptRows
from meft_bench.meft.engine.slots import Slots
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.model import attach
from tests.meft.test_engine import EVERYTHING, budget_for, micro_batch, tiny_meft
from tests.meft.tiny_models import LAYERS, D, hidden, make_adapter, small_config, tiny_llama, tokens

ROW = 16 * D
"""Device bytes of a row and its gradient, fp32."""


def kept_rows(capacity: int) -> KeptRows:
    adapter: MeftAdapter = make_adapter(small_config(gate="none", device_budget=capacity * ROW))
    adapter.prepare(hidden())
    loan = adapter.take().loan
    loan.release(loan.arrived())
    rows = adapter.residency
    assert isinstance(rows, KeptRows)
    rows.collect()
    rows.slots = Slots(rows.slots.slot_R.shape[0], rows.capacity)
    rows.adapter = adapter  # type: ignore[attr-defined]  (keeps it alive)
    return rows


def lend(rows: KeptRows, *union: int) -> tuple[KeptLoan, Tensor]:
    """As in forward and at the start of backward, where rows count as used."""
    loan = rows.lend(torch.tensor(union), training=True)
    loan.settle()
    return loan, loan.arrived()


def test_a_pinned_row_is_not_evicted() -> None:
    """A backward pass still reads it, however much others are used."""
    rows = kept_rows(2)
    pinned, sent = lend(rows, 1, 2)
    for _ in range(5):
        other, other_sent = lend(rows, 7, 8)
        assert torch.equal(other.rows(other_sent), rows.store.rows_R2D[[7, 8]])
        other.release(other_sent)
        assert rows.slots.slot_R[[1, 2]].ge(0).all() and rows.slots.slot_R[[7, 8]].eq(-1).all()
        assert torch.equal(pinned.rows(sent), rows.store.rows_R2D[[1, 2]])
    gradient = torch.ones(2, 2, D)
    pinned.add_gradients(gradient)
    pinned.release(sent)
    rows.collect()
    assert rows.store.grads.filled_rows().tolist() == [1, 2]
    other, other_sent = lend(rows, 7, 8)
    assert rows.slots.slot_R[[7, 8]].ge(0).all(), "once released, the rows used least give way"


def test_a_pinned_row_that_changed_is_not_renewed_under_its_reader() -> None:
    rows = kept_rows(2)
    pinned, sent = lend(rows, 1, 2)
    before = rows.store.rows_R2D[[1, 2]].clone()
    with torch.no_grad():
        rows.store.values.mul_(2)
    other, other_sent = lend(rows, 1, 2)
    assert torch.equal(other.rows(other_sent), rows.store.rows_R2D[[1, 2]]), "the new values pass through"
    assert torch.equal(pinned.rows(sent), before)


def test_in_evaluation_kept_rows_get_their_gradients_too() -> None:
    """A model in eval mode has a backward pass like any other."""
    rows = kept_rows(2)
    kept, sent = lend(rows, 1, 2)
    kept.release(sent)
    loan = rows.lend(torch.tensor([1, 2, 7]), training=False)
    sent = loan.arrived()
    loan.add_gradients(torch.ones(3, 2, D))
    loan.release(sent)
    rows.store.gradients_home()
    assert rows.store.grads.filled_rows().tolist() == [1, 2, 7]
    assert torch.equal(rows.store.gradients()[[1, 2, 7]], torch.ones(3, 2, D))


@pytest.mark.parametrize("fails", ["send_home", "sent_rows"])
def test_after_a_loan_that_failed_the_books_are_right(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without room, say, for a second backward pass: no stale row is lent, and no gradient is lost."""
    rows = kept_rows(2)
    first, sent = lend(rows, 1, 2)
    first.add_gradients(torch.ones(2, 2, D))
    first.release(sent)
    other, other_sent = lend(rows, 7, 8)
    other.release(other_sent)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no room"):
        broken.setattr(residency, fails, no_room)
        lend(rows, 7, 8)  # used more by now: 1 and 2 would make room
    assert not rows.slots.pins_C.any()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no room"):
        broken.setattr(residency, "send_home", no_room)
        rows.collect()
    rows.store.gradients_home()
    assert rows.store.grads.filled_rows().tolist() == [1, 2] and not rows.grads_CHD.any()
    assert torch.equal(rows.store.gradients()[[1, 2]], torch.ones(2, 2, D))
    for union in ([1, 2], [7, 8]):
        loan, sent = lend(rows, *union)
        assert torch.equal(loan.rows(sent), rows.store.rows_R2D[union])
        loan.release(sent)


def no_room(*given: object) -> None:
    raise RuntimeError("no room")


def test_pins_count_their_readers() -> None:
    rows = kept_rows(2)
    first, first_sent = lend(rows, 1, 2)
    second, second_sent = lend(rows, 1, 2)
    first.release(first_sent)
    first.release(first_sent)  # a second time changes nothing
    assert rows.slots.pins_C.tolist() == [1, 1]
    second.release(second_sent)
    assert rows.slots.pins_C.tolist() == [0, 0]


def test_evaluation_admits_and_pins_nothing() -> None:
    rows = kept_rows(2)
    loan = rows.lend(torch.tensor([1, 2]), training=False)
    sent = loan.arrived()
    assert torch.equal(loan.rows(sent), rows.store.rows_R2D[[1, 2]])
    assert rows.slots.slot_R.eq(-1).all() and not rows.slots.pins_C.any() and not rows.slots.uses_R.any()


def test_a_checkpoint_s_second_forward_pass_finds_the_rows_of_the_first_where_they_were() -> None:
    """What crosses may not differ, so a row becomes one that is used more than others only when backward uses it."""
    rows = kept_rows(2)
    loan, sent = lend(rows, 1, 2)
    loan.release(sent)
    union = torch.tensor([7, 8])
    first, second = (rows.lend(union, training=True) for _ in range(2))
    assert torch.equal(first.sent_rows, union) and torch.equal(second.sent_rows, union)
    first.settle()
    for one in (first, second):
        one.release(one.arrived())
    later = rows.lend(union, training=True)
    assert later.sent_rows.numel() == 0, "now they are used more than rows 1 and 2"
    later.release(later.arrived())


def test_uses_of_held_rows_fade_once_per_window() -> None:
    meft = tiny_meft(device_budget=budget_for("some rows", {}), retrieval="host")
    optimizer = meft.make_optimizer(lr=1e-2)
    for step in range(3):
        micro_batch(meft, step)
        optimizer.step()
        optimizer.zero_grad()
    (slots, *_) = [adapter.residency.slots for adapter in meft.adapters]
    assert slots.held
    before = slots.uses_R.clone()
    loan = meft.adapters[0].residency.lend(slots.row_C.sort().values, training=True)
    loan.settle()
    loan.add_gradients(torch.ones(5, 2, D))
    loan.release(loan.arrived())
    optimizer.step()
    optimizer.zero_grad()
    before[slots.row_C] += 1
    torch.testing.assert_close(slots.uses_R, 0.9 * before)


def test_uses_fade_once_per_window() -> None:
    rows = kept_rows(2)
    loan, sent = lend(rows, 1, 2)
    loan.add_gradients(torch.ones(2, 2, D))
    loan.release(sent)
    for _ in range(3):  # clipping and the optimizer both ask
        rows.collect()
    torch.testing.assert_close(rows.slots.uses_R[[1, 2]], torch.tensor([0.9, 0.9]))


@pytest.mark.parametrize("dtype", ["model", "bf16"])
def test_the_router_s_bytes_are_counted(dtype: str) -> None:
    """Once each way per optimizer step, in the wire's format."""
    price = prices(small_config(wire=dtype), D, torch.float32)
    meft = tiny_meft(device_budget=LAYERS * (price.router + 24 * price.row), wire=dtype)
    optimizer = meft.make_optimizer(lr=1e-2)
    size = LAYERS * 6 * D * (2 if dtype == "bf16" else 4)
    for step in range(2):
        for micro in range(3):
            micro_batch(meft, 3 * step + micro)
        crossed = meft.link.bytes
        assert crossed["h2d", "router"] == (step + 1) * size and crossed["d2h", "router"] == step * size
        optimizer.step()  # after which the host sends what it changed
        optimizer.zero_grad()
        assert crossed["h2d", "router"] == (step + 2) * size and crossed["d2h", "router"] == (step + 1) * size
        assert not {("h2d", "score"), ("d2h", "score"), ("h2d", "router_hidden")} & meft.link.bytes.keys()


@pytest.mark.parametrize("options", [{}, {"device_budget": EVERYTHING}, {"overlap": True}, {"frozen_keys": True}])
def test_clipping_is_torch_s_over_keys_values_and_router(options: dict) -> None:
    """Each of the three is in the norm and each is scaled."""
    for loud in ("keys", "values", "router"):
        if loud == "keys" and options.get("frozen_keys"):
            continue
        ours, theirs = tiny_meft(**options), tiny_meft(**options)
        for meft in (ours, theirs):
            micro_batch(meft, 0)
            for store in meft.stores:
                getattr(store, loud).grad.mul_(100.0)
        parameters = [p for s in theirs.stores for p in s.parameters() if p.requires_grad]
        norm, wanted = ours.clip_grad_norm_(0.3), torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 1
        got = [p for s in ours.stores for p in s.parameters() if p.requires_grad]
        for a, b in zip(got, parameters, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("router_init", ["mean_key", "normal"])
def test_the_seed_reaches_the_initial_rows(router_init: str) -> None:
    def made(seed: int) -> list[Tensor]:
        stores = attach(tiny_llama(), small_config(router_init=router_init), seed=seed).stores
        return [t for store in stores for t in (store.keys.detach(), store.router.detach())]

    one, same, other = made(1), made(1), made(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[2]), "layers differ"


def test_a_row_that_only_drifted_crosses_again() -> None:
    """Rows without a gradient move too; their copies on the device must not stay behind."""
    rows = kept_rows(2)
    optimizer = DenseRowAdamW([rows.store], lr=1e-2)
    rows.store.add_gradients(torch.tensor([1, 2]), torch.ones(2, 2, D))
    seen = []
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loan, sent = lend(rows, 1, 2)
        assert torch.equal(loan.rows(sent), rows.store.rows_R2D[[1, 2]])
        seen.append(loan.rows(sent).clone())
        loan.release(sent)
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("budget", [0, EVERYTHING])
@pytest.mark.parametrize("between", ["step", "write"])
def test_a_graph_whose_rows_are_gone_says_so(between: str, budget: int) -> None:
    meft = tiny_meft(device_budget=budget)
    optimizer = meft.make_optimizer(lr=1e-2)
    loss = meft.model(tokens()).square().mean()
    loss.backward(retain_graph=True)
    if between == "step":
        optimizer.step()
    else:
        with torch.no_grad():
            for store in meft.stores:
                store.keys.mul_(2.0)
        micro_batch(meft, 1)  # whose search notices
    with pytest.raises(RuntimeError, match="rows of this forward pass are gone"):
        loss.backward()


@pytest.mark.parametrize("how", ["data", "old alias"])
@pytest.mark.parametrize("options", [{"device_budget": EVERYTHING}, {"scoring": "bf16"}, {"scoring": "int8"}])
def test_copies_follow_what_is_written_between_two_passes(options: dict, how: str) -> None:
    """Without a step in between: a write past torch's version counter, and one into memory taken out before."""
    meft, fresh = tiny_meft(**options), tiny_meft(**options)
    aliases = [[p.detach() for p in store.parameters()] for store in meft.stores]
    micro_batch(meft, 0)
    generator = torch.Generator().manual_seed(0)
    for store, mine, theirs in zip(meft.stores, aliases, fresh.stores, strict=True):
        for parameter, alias, other in zip(store.parameters(), mine, theirs.parameters(), strict=True):
            new = 0.3 * torch.randn(parameter.shape, generator=generator)
            (parameter.data if how == "data" else alias).copy_(new)
            other.data.copy_(new)
    assert micro_batch(meft, 1) == micro_batch(fresh, 1)
