"""What ranks may do apart from one another, what they may not, and how each refusal reads."""

import copy
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meft_bench import host_memory
from meft_bench.meft.engine.topology import PER_NODE, TIMEOUT, RankFailure
from meft_bench.meft.model import MeftModel, attach
from meft_bench.ranks import ENGINE_TIMEOUT
from tests.meft.rank_runs import LR, left, loss_of, start
from tests.meft.tiny_models import D, fill_values, small_config, tiny_stack, tokens

CHECKS: dict[str, Callable[[int], Any]] = {}


def check(work: Callable[[int], Any]) -> Callable[[int], Any]:
    """A function of the rank, run on two ranks of one node; what it returns is judged in the test of the same name."""
    CHECKS[work.__name__] = work
    return work


def made(seed: int = 3, **changes: Any) -> MeftModel:
    meft = attach(tiny_stack(), small_config(**changes), seed=seed)
    fill_values(meft)
    return meft


def refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def step(meft: MeftModel, optimizer: torch.optim.Optimizer, number: int, mine: list[int], of: int) -> None:
    for i in mine:
        loss_of(meft, number, i, of).backward()
    meft.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()


def alone(steps: int, of: int, **changes: Any) -> dict[str, torch.Tensor]:
    meft = made(**changes)
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(steps):
        step(meft, optimizer, number, list(range(of)), of)
    return left(meft, optimizer)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())


# ---- refusals ----


@check
def other_rows(rank: int) -> str:
    return refused(lambda: made(seed=rank).make_optimizer(lr=LR))


@check
def other_options(rank: int) -> str:
    return refused(lambda: made(kept=4 + rank).make_optimizer(lr=LR))


@check
def another_rate(rank: int) -> str:
    return refused(lambda: made().make_optimizer(lr=LR * (1 + rank)))


@check
def rows_on_the_device(rank: int) -> str:
    return refused(lambda: made(placement="device").make_optimizer(lr=LR))


@check
def too_little_memory(rank: int) -> str:
    before, host_memory.available_bytes = host_memory.available_bytes, lambda: 4096 * (1 + 10**6 * rank)
    try:
        return refused(lambda: made().make_optimizer(lr=LR))
    finally:
        host_memory.available_bytes = before


@check
def a_foreign_clip(rank: int) -> str:
    meft = made()
    meft.make_optimizer(lr=LR)
    loss_of(meft, 0, rank, 2).backward()
    parameters = [p for p in meft.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    return refused(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))


@check
def a_foreign_optimizer(rank: int) -> str:
    meft = made()
    meft.make_optimizer(lr=LR)
    loss_of(meft, 0, rank, 2).backward()
    return refused(torch.optim.AdamW([p for p in meft.model.parameters() if p.requires_grad], lr=LR).step)


@check
def gradients_after_the_sum(rank: int) -> str:
    meft = made()
    meft.make_optimizer(lr=LR)
    loss_of(meft, 0, rank, 2).backward()
    meft.clip_grad_norm_(1.0)
    return refused(loss_of(meft, 0, rank, 2).backward)


@check
def a_rate_of_its_own(rank: int) -> str:
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    loss_of(meft, 0, rank, 2).backward()
    optimizer.param_groups[0]["lr"] = LR * (1 + rank)
    return refused(optimizer.step)


REFUSALS = {
    "other_rows": ("ranks disagree in what they train: rows to start from is", "with the same arguments, seed"),
    "other_options": ("kept is 4 on rank 0 and 5 on rank 1",) * 2,
    "another_rate": ("lr is 0.02 on rank 0 and 0.04 on rank 1",) * 2,
    "rows_on_the_device": ("with several ranks take 'host'",) * 2,
    "too_little_memory": ("GiB of memory, and 0.00 GiB are free: use fewer neurons",) * 2,
    "a_foreign_clip": ("clip with meft_bench.clip_grad_norm_",) * 2,
    "a_foreign_optimizer": ("step with meft_bench.make_optimizer",) * 2,
    "gradients_after_the_sum": ("call zero_grad() after each step",) * 2,
    "a_rate_of_its_own": ("nothing", "steps at a learning rate of 0.04, the first rank of its node at 0.02"),
}


# ---- what is allowed ----


@check
def uneven_shares(rank: int) -> Any:
    """Three micro-batches in a step: rank 0 has two of them."""
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(3):
        step(meft, optimizer, number, [0, 2] if rank == 0 else [1], 3)
    return left(meft, optimizer)


@check
def thrown_away(rank: int) -> Any:
    """All ranks clear what they had before a step."""
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(2):
        loss_of(meft, 9, rank, 2).backward()
        meft.model.zero_grad()
        step(meft, optimizer, number, [rank], 2)
    return left(meft, optimizer)


@check
def gone_on(rank: int) -> Any:
    """Rank 0 alone reads the state after two steps; both load it into a fresh model and go on."""
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(2):
        step(meft, optimizer, number, [rank], 2)
    kept = [None]
    if rank == 0:
        weights = {name: t.clone() for name, t in meft.model.state_dict().items()}
        kept = [(weights, copy.deepcopy(optimizer.state_dict()))]
    dist.broadcast_object_list(kept)
    assert kept[0] is not None
    fresh = made()
    other = fresh.make_optimizer(lr=LR)
    fresh.model.load_state_dict(kept[0][0])
    other.load_state_dict(kept[0][1])
    for number in range(2, 4):
        step(fresh, other, number, [rank], 2)
    return left(fresh, other)


@check
def looked_at_by_one(rank: int) -> Any:
    """One rank evaluates, reads parameters and copies the model between steps; the other just goes on."""
    meft = made(scoring="int8", device_budget=3_000, retrieval="host")
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(3):
        if rank == 1:
            with torch.no_grad():
                ids = tokens(2, 6, seed=number)
                before = meft.model.eval()(ids)
                copied = copy.deepcopy(meft.model)
                assert torch.equal(copied(ids), before)
                assert all(torch.isfinite(p).all() for p in meft.model.parameters())
                for p in copied.parameters():
                    p.zero_()  # a copy is its own
            meft.model.train()
        step(meft, optimizer, number, [rank], 2)
    return left(meft, optimizer)


@check
def written_by_one(rank: int) -> Any:
    """What one rank writes into a parameter is what both compute with, whatever copies they keep."""

    def write(store: Any) -> None:
        store.keys.mul_(-1.5)
        store.values.add_(0.1)

    return _written_in_turn(rank, made(scoring="bf16", device_budget=3_000, retrieval="host"), write)


def _written_in_turn(rank: int, meft: Any, write: Callable[[Any], None]) -> Any:
    """After a step each rank writes once; what both compute with after each."""
    optimizer = meft.make_optimizer(lr=LR)
    step(meft, optimizer, 0, [rank], 2)
    ids = tokens(2, 6, seed=5)
    found = []
    for number in range(2):
        dist.barrier()
        if rank == number:
            with torch.no_grad():
                for store in meft.stores:
                    write(store)
        dist.barrier()
        with torch.no_grad():
            found.append(meft.model(ids))
    return {str(i): t for i, t in enumerate(found)}


@check
def router_written_by_one(rank: int) -> Any:
    """Of which each has a copy on its device."""
    return _written_in_turn(rank, made(device_budget=10**7), lambda store: store.router.mul_(-1.5))


@check
def clipped_twice(rank: int) -> Any:
    """By a rank that is late to measure and one that is not."""
    meft = made()
    meft.make_optimizer(lr=LR)
    loss_of(meft, 0, rank, 2).backward()
    shares = [store.share for store in meft.stores if store.share is not None]
    for share in shares[:1] if rank == 1 else ():
        squares_R = share.grads.squares_R

        def late(squares_R=squares_R) -> torch.Tensor:
            time.sleep(0.3)
            return squares_R()

        share.grads.squares_R = late  # type: ignore[method-assign]
    return {f"{norm}": meft.clip_grad_norm_(norm) for norm in (1e-3, 1e-4)}


@check
def loaded_again(rank: int) -> Any:
    """What was there two steps ago, by ranks of which one is late."""
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(2):
        step(meft, optimizer, number, [rank], 2)
    weights = {name: t.clone() for name, t in meft.model.state_dict().items()}
    kept = copy.deepcopy(optimizer.state_dict())
    for number in range(2, 4):
        step(meft, optimizer, number, [rank], 2)
    meft.model.load_state_dict(weights)
    dist.barrier()
    settle = optimizer.settle

    def late() -> None:
        time.sleep(0.3)
        settle()

    if rank == 1:
        optimizer.settle = late
    optimizer.load_state_dict(kept)
    optimizer.settle = settle
    return left(meft, optimizer)


def stood_still(mine: list[int], writes: bool, ranked: bool) -> dict[str, torch.Tensor]:
    """Steps that change no row, until one rank writes zeros, which they change."""
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    for number in range(4):
        if number == 2 and writes:
            with torch.no_grad():
                for store in meft.stores:
                    store.values.zero_()
        if ranked:
            dist.barrier()
        for i in mine:
            (1e-17 * loss_of(meft, number, i, 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return left(meft, optimizer)


@check
def written_where_rows_stand_still(rank: int) -> Any:
    return stood_still([rank], writes=rank == 1, ranked=True)


@check
def left_alone(rank: int) -> Any:
    """The ranks part after a step, and each trains on by itself."""
    meft = made()
    step(meft, meft.make_optimizer(lr=LR), 0, [rank], 2)
    dist.destroy_process_group()
    optimizer = meft.make_optimizer(lr=LR)
    step(meft, optimizer, 1, [0, 1], 2)
    assert all(store.keys.grad is not None and store.share is None for store in meft.stores)
    return left(meft, optimizer)


def _all(rank: int, world: int) -> dict[str, Any]:
    return {name: work(rank) for name, work in CHECKS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    made = start(2, _all, tmp_path_factory.mktemp("rules"))
    for one in made:
        assert isinstance(one, dict), one
    return made


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_clear_line(found, name):
    for rank, message in enumerate(REFUSALS[name]):
        assert message in found[rank][name] and "\n" not in found[rank][name], found[rank][name]


@pytest.mark.parametrize(
    "name, about",
    [
        ("uneven_shares", {"steps": 3, "of": 3}),
        ("thrown_away", {"steps": 2, "of": 2}),
        ("gone_on", {"steps": 4, "of": 2}),
        ("looked_at_by_one", {"steps": 3, "of": 2, "scoring": "int8", "device_budget": 3_000, "retrieval": "host"}),
    ],
)
def test_what_ranks_may_do_apart(found, name, about):
    wanted = alone(**about)
    assert same(found[0][name], wanted) and same(found[1][name], wanted)


def test_all_ranks_measure_the_same_however_late_one_is(found):
    meft = made()
    meft.make_optimizer(lr=LR)
    for number in range(2):
        loss_of(meft, 0, number, 2).backward()
    wanted = {f"{norm}": meft.clip_grad_norm_(norm) for norm in (1e-3, 1e-4)}
    assert (
        wanted["0.001"] > 1e-3 and same(found[0]["clipped_twice"], wanted) and same(found[1]["clipped_twice"], wanted)
    )


def test_a_state_is_loaded_when_no_rank_brings_rows_up_to_date_any_more(found):
    wanted = alone(steps=2, of=2)
    assert same(found[0]["loaded_again"], wanted) and same(found[1]["loaded_again"], wanted)


def test_rows_that_stood_still_move_on_from_what_one_rank_writes(found):
    wanted = stood_still([0, 1], writes=True, ranked=False)
    for rank in found:
        assert same(rank["written_where_rows_stand_still"], wanted)


def test_a_process_that_is_alone_again_has_rows_of_its_own(found):
    meft = made()
    step(meft, meft.make_optimizer(lr=LR), 0, [0, 1], 2)
    optimizer = meft.make_optimizer(lr=LR)
    step(meft, optimizer, 1, [0, 1], 2)
    assert all(same(rank["left_alone"], left(meft, optimizer)) for rank in found)


@pytest.mark.parametrize("name", ["written_by_one", "router_written_by_one"])
def test_what_one_rank_writes_all_see(found, name):
    first, second = (rank[name] for rank in found)
    assert torch.equal(first["0"], second["0"]) and torch.equal(first["1"], second["1"])
    assert not torch.equal(first["0"], first["1"])


# ---- over nodes, and ranks that go ----


def _counted(rank: int, world: int) -> tuple[int, int, dict[str, int]]:
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    touched = 0
    for number in range(3):
        loss_of(meft, number, rank, world).backward()
        meft.clip_grad_norm_(0.5)
        touched += sum(int(store.touched_R.sum()) for store in meft.stores)
        optimizer.step()
        optimizer.zero_grad()
    return touched, sum(store.router.numel() for store in meft.stores), dict(optimizer.team.bytes)


def test_no_more_crosses_between_nodes_than_each_touched_row_once_each_way(tmp_path):
    for world, nodes, per_node in ((2, 2, 1), (4, 2, 2), (3, 3, 1)):
        folder = tmp_path / str(world)
        folder.mkdir()
        ranks = start(world, _counted, folder, {PER_NODE: str(per_node)})
        assert all(isinstance(one, tuple) for one in ranks), ranks
        touched, router, _ = ranks[0]
        sent = {name: sum(rank[2][name] for rank in ranks) for name in ("gradients", "router", "rows")}
        assert all(rank[0] == touched for rank in ranks) and touched
        bound = 2 * touched * 2 * D * 4 * (nodes - 1)  # of all nodes; of each the nodes-th part
        assert 0 < sent["gradients"] <= bound and sent["gradients"] > bound / 4
        assert sent["router"] == 2 * 3 * router * 4 * (nodes - 1)
        listed = touched + 3 * sum(store.router.shape[0] for store in made().stores)
        assert sent["rows"] <= 2 * listed * 4 * (nodes - 1)  # four bytes name a row


def _left_by_one(rank: int, world: int, how: str, folder: Path) -> str:
    meft = made()
    optimizer = meft.make_optimizer(lr=LR)
    step(meft, optimizer, 0, [rank], 2)
    if rank == 1:
        if how == "dies":
            os._exit(1)
        while not (folder / "0.pt").exists():
            time.sleep(0.1)
        return ""
    began = time.monotonic()
    try:
        step(meft, optimizer, 1, [rank], 2)
    except RankFailure as error:
        return f"{time.monotonic() - began:.1f} {error}"
    return "nothing"


@pytest.mark.parametrize(
    "how, per_node, message",
    [
        ("dies", "2", "another rank has died (process "),
        ("dies", "1", "another rank has died or did not come within"),
        ("hangs", "2", "timed out: it has waited 5 s (MEFT_BENCH_RANKS_TIMEOUT)"),
        ("hangs", "1", "did not come within 5 s (MEFT_BENCH_RANKS_TIMEOUT)"),
    ],
)
def test_who_waits_for_a_rank_that_is_gone_says_so_soon(tmp_path, how, per_node, message):
    limit = {TIMEOUT: "5" if how == "hangs" else "120", PER_NODE: per_node}
    said = start(2, functools.partial(_left_by_one, how=how, folder=tmp_path), tmp_path, limit)[0]
    assert message in said and float(said.split()[0]) < 60 and "\n" not in said, said


@pytest.mark.parametrize(
    "environment, message",
    [
        ({PER_NODE: "2"}, "nodes with 2, 1 ranks"),
        ({PER_NODE: "0"}, f"{PER_NODE}='0' is no positive whole number"),
        ({TIMEOUT: "soon"}, f"{TIMEOUT}='soon' is no positive number of seconds"),
    ],
)
def test_settings_that_cannot_be(tmp_path, environment, message):
    for said in start(3, lambda rank, world: refused(lambda: made().make_optimizer(lr=LR)), tmp_path, environment):
        assert message in said, said


def test_a_run_sets_the_timeout_that_the_engine_reads():
    assert ENGINE_TIMEOUT == TIMEOUT
