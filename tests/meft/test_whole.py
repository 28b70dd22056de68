"""All rows on the device, with no list of what lies where: numbers are slots, marks say which rows have a gradient."""

import pytest
import torch
from torch import Tensor

from meft_bench.meft.adam import ROW_ADAM, DenseRowAdamW
from meft_bench.meft.engine.budget import whole
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.engine.whole import WholeLoan, WholeRows
from tests.meft.tiny_models import D, hidden, make_adapter, small_config

R = 24
USED = torch.tensor([[3, 7, -1], [7, 20, 3], [-1, -1, -1]])
"""Neurons of three tokens; -1 where one kept fewer."""
ROWS = [3, 7, 20]


def whole_rows(everything: bool = False) -> WholeRows:
    config = small_config(gate="none")
    budget = whole(config, 1, D, torch.float32)
    adapter = make_adapter(small_config(gate="none", device_budget=budget, retrieval="host"))
    adapter.prepare(hidden())
    loan = adapter.take().loan
    loan.release(loan.arrived())
    rows = adapter.residency
    assert isinstance(rows, WholeRows)
    rows.adam = rows.adam if everything else None  # as with several ranks
    rows.adapter = adapter  # type: ignore[attr-defined]  (keeps it alive)
    return rows


def lend(rows: WholeRows, used: Tensor = USED) -> WholeLoan:
    rows.ready()
    return rows.lend_all(used)


def some_gradients(seed: int = 0) -> Tensor:
    """[R, 2, D], zero but for the rows in use."""
    grads = torch.zeros(R, 2, D)
    grads[ROWS] = torch.randn(len(ROWS), 2, D, generator=torch.Generator().manual_seed(seed))
    return grads


def crossed(rows: WholeRows) -> dict[tuple[str, str], int]:
    return {key: number for key, number in rows.link.bytes.items() if number}


def test_all_rows_are_lent_as_they_are() -> None:
    rows = whole_rows()
    loan = lend(rows)
    lent = loan.rows(loan.arrived())
    assert lent.data_ptr() == rows.rows_R2D.data_ptr(), "no copy"
    assert torch.equal(lent, rows.store.rows_R2D)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{"scoring": "int8"}, {"key_experts": False, "retrieval": "device"}], ids=str)
def test_rows_are_there_where_a_copy_of_the_keys_is_searched(options: dict, overlap: bool) -> None:
    """An int8 copy is kept beside all rows. They come before the first step, which an answer is without, and after
    somebody has written into them."""
    options = {**options, "kept": 24, "selection": "signed", **({"probed": 6} if "scoring" in options else {})}
    budget = whole(small_config(**options), 1, D, torch.float32)
    adapter = make_adapter(small_config(**options, device_budget=budget, overlap=overlap))
    wanted = make_adapter(small_config(**{**options, "retrieval": "host", "scoring": "fp32"}))
    for written in (False, True):
        if written:
            for one in (adapter, wanted):
                with torch.no_grad():
                    one.store.values.mul_(2.0)
        with torch.no_grad():
            torch.testing.assert_close(adapter(hidden()), wanted(hidden()))
    assert isinstance(adapter.residency, WholeRows) and adapter.index is not None and adapter.selects_on_device


def test_a_micro_batch_moves_nothing_and_a_window_what_it_must() -> None:
    rows, two = whole_rows(), [some_gradients(0), some_gradients(1)]
    optimizer = DenseRowAdamW([rows.store], lr=1e-2)
    optimizer.step()  # rows without a gradient are looked at once
    optimizer.zero_grad()
    rows.ready()
    rows.link.reset()
    for grads in two:
        loan = lend(rows)
        loan.add_gradients(grads)
        loan.release(loan.arrived())
    assert crossed(rows) == {}
    rows.collect()
    marks, row = R, 2 * D * 4
    assert crossed(rows) == {("d2h", "index"): marks, ("h2d", "index"): 4 * 3, ("d2h", "grads"): 3 * row}
    assert rows.store.grads.filled_rows().tolist() == ROWS
    assert torch.equal(rows.store.values.grad, (two[0] + two[1])[:, 1])
    optimizer.step()
    rows.link.reset()
    rows.ready()
    rows.ready()
    assert crossed(rows) == {("h2d", "rows"): 3 * row, ("h2d", "index"): 4 * 3}, "only what the step changed, once"
    assert torch.equal(rows.rows_R2D, rows.store.rows_R2D)


def test_a_window_s_gradients_are_its_own() -> None:
    rows = whole_rows()
    for seed in range(3):
        loan = lend(rows)
        loan.add_gradients(some_gradients(seed))
        loan.release(loan.arrived())
        rows.collect()
        rows.collect()  # nothing waits any more
        assert torch.equal(rows.store.keys.grad, some_gradients(seed)[:, 0])
        rows.store.clear_gradients()


def test_a_pass_to_come_keeps_the_rows_it_read() -> None:
    rows = whole_rows()
    early = lend(rows)
    before = early.rows(early.arrived()).clone()
    with torch.no_grad():
        rows.store.values.add_(1.0)
    late = lend(rows)
    assert torch.equal(late.rows(late.arrived()), rows.store.rows_R2D)
    assert torch.equal(early.rows(early.arrived()), before)
    early.release(early.arrived())
    held = rows.rows_R2D.data_ptr()
    late.release(late.arrived())
    with torch.no_grad():
        rows.store.values.add_(1.0)
    rows.ready()
    assert rows.rows_R2D.data_ptr() == held, "once nobody reads them, rows are renewed where they are"


def test_a_loan_that_is_forgotten_holds_nothing() -> None:
    rows = whole_rows()
    loan = lend(rows)
    assert rows.readers
    del loan
    assert not rows.readers


@pytest.mark.parametrize("lazy", [False, True])
def test_with_every_optimizer_there_only_the_norm_crosses(lazy: bool) -> None:
    """Where the device selects: nothing of rows, gradients or moments, whatever the window."""
    rows, twin = whole_rows(everything=True), whole_rows()  # the twin's optimizer is on the host
    assert rows.adam is not None
    rows.adam.host_selects = False
    kind = "lazy" if lazy else "dense"
    ours, theirs = ROW_ADAM[kind]([rows.store], lr=1e-2), ROW_ADAM[kind]([twin.store], lr=1e-2)
    for step in range(4):
        rows.link.reset()
        for held, optimizer in ((rows, ours), (twin, theirs)):
            loan = lend(held)
            loan.add_gradients(some_gradients(step))
            loan.release(loan.arrived())
            held.collect()
            clip_grad_norm([held.store], 1e9)
            optimizer.step()
            optimizer.zero_grad()
        if step > 1:
            assert crossed(rows) == {("d2h", "norm"): 8}
    rows.ready(), twin.ready()
    assert torch.equal(rows.rows_R2D, twin.rows_R2D)
    assert torch.equal(rows.store.values.detach(), twin.store.values.detach())
