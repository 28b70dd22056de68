"""AdamW over the rows of neuron stores, its moments beside the rows in host memory.

"dense" follows torch's AdamW over all rows: a row without a gradient has a zero one, its moments decay and it drifts.
Those updates are made late, when something reads the row, and then one by one (adamw.advance), so the trajectory is
the same to the last bit as if every row had been updated at every step, while a step costs what its rows cost. "lazy"
updates the rows of S alone, each with its own step count; the rest neither decay nor move.

A step may run in the background (the stores' queues): it returns at once, and whoever reads rows waits for it. Several
optimizers of the same stores may take turns.

With torch.distributed the ranks train together (engine/team.py): each makes the optimizer, its steps and
load_state_dict() when the others do; state_dict() is any rank's own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from meft_bench import observe
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.schedule import Schedule, check_settings
from meft_bench.meft.engine.team import join
from meft_bench.meft.engine.updates import StoreUpdates
from meft_bench.meft.engine.workers import LATER, UPDATE
from meft_bench.meft.store import NeuronStore

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RowAdamW(torch.optim.Optimizer):
    """Common part of DenseRowAdamW and LazyRowAdamW; takes the stores' parameters as one group.

    State per parameter, as in torch.optim.AdamW: exp_avg and exp_avg_sq (shape of the parameter; fp32, or bf16 with
    stochastic rounding for moments="bf16") and step (scalar fp32; [R] fp32 for "lazy"). Without weight decay unless
    given, as the paper. state_dict() brings all rows up to date first; before a look at .state itself, settle() does.

    A store of which nothing trains when this is made is left alone. Raises ValueError for one that trains without its
    values. A router that is frozen later stays as it is, with its moments, while it is frozen; set free again, its bias
    correction counts the steps between, too, where torch's would not.
    """

    each_row_counts = False

    def __init__(
        self,
        stores: Iterable[NeuronStore],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "fp32",
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r} is unknown; choose one of {', '.join(MOMENTS)}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_settings(settings)
        self.stores = list(stores)
        for store in self.stores:
            if store.trains and not store.handle("values").requires_grad:
                raise ValueError(f"{store.queue.name}: its values are frozen and its keys or its router are not; "
                                 "let values train, freeze the whole layer, or use another optimizer")  # fmt: skip
            store.settle()
        self.moments: torch.dtype = MOMENTS[moments]
        self.team = join(self.stores, settings, self.moments, self.each_row_counts)
        """The ranks that step together; None in a process alone."""
        for store in self.stores:
            store.prepare_gradients()
        parameters = [p for store in self.stores for p in store.parameters() if p.requires_grad]
        super().__init__(parameters, settings)
        self.steps_done = 0
        self._schedule = Schedule(0, betas, eps)
        counted = self.each_row_counts
        self.updates = [
            StoreUpdates(store, self, number, counted) for number, store in enumerate(self.stores) if store.trains
        ]
        for store in self.stores:
            store.looked_at = False

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: of a copy, torch keeps neither the stores nor what is due to their rows."""
        raise TypeError("this optimizer is bound to its model's neurons and cannot be copied or pickled: make one for "
                        "the copied model and load state_dict() into it")  # fmt: skip

    @torch.no_grad()
    @observe.announced("adam")
    @engine
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; closure is not supported. In the background where the stores' queues are."""
        assert closure is None, "row-wise AdamW takes no closure"
        group = self.param_groups[0]
        check_settings(group)
        if not any(parameter.requires_grad for parameter in group["params"]):
            # Frozen neurons show no gradient: the step would lose it, and still move them by their moments.
            raise ValueError(
                "neurons of this optimizer are frozen now, as those of an adapter that is not active: make the adapter "
                "active (set_adapter) before step(), or leave the step out"
            )
        for updates in self.updates:
            updates.take_over()
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        if not self._schedule.goes_on(group):
            self.settle()  # the old constants end here
            self._schedule = Schedule(self.steps_done, group["betas"], group["eps"])
        if self.team is not None:
            self.team.sum()
            self.team.enter_step(lr, weight_decay)
        self._schedule.add(self.steps_done + 1, lr, weight_decay)
        self.steps_done += 1
        constants = self._schedule.constants()
        for updates in self.updates:
            updates.store.collect()
            updates.prepare()
            queue = updates.store.queue
            queue.submit(updates.step, self.steps_done, constants, lr, weight_decay, priority=UPDATE)
            if queue.background and self.team is None:  # ranks do so within the step, each for its rows
                queue.submit(updates.refresh_read_keys, priority=LATER)
            updates.store.stepped()

    @engine
    def settle(self) -> None:
        """Wait for background work and bring every row and its moments home and up to date."""
        for updates in self._in_turn():
            updates.store.come_home()
            updates.finish()

    @engine
    def catch_up(self) -> None:
        """Wait for background work and bring every row in host memory up to date. Rows whose optimizer is on the device
        stay there, as in the next step: this is no look at them."""
        for updates in self._in_turn():
            updates.store.queue.wait()
            if updates.store.share is not None:
                updates.store.share.wait()
            updates.finish()

    def _in_turn(self) -> list[StoreUpdates]:
        """Ranks that settle together begin with different layers, as each is brought up to date by one of them."""
        first = 0 if self.team is None else self.team.share_of(len(self.updates))
        return self.updates[first:] + self.updates[:first]

    @observe.announced("adam")
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; .grad shows zeros, in place, as the buffers are part of the store. Where device_budget
        pays for it, the optimizer of rows then goes to the device."""
        for updates in self.updates:
            updates.store.clear_gradients()
            source = updates.store.source() if updates.store.source is not None else None
            if source is not None and self.steps_done and updates.store.updates is updates:
                source.take_optimizer(updates)

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW; rows up to date, tensors whole."""
        self.settle()
        packed = super().state_dict()
        packed["state"] = {
            number: {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in entry.items()}
            for number, entry in packed["state"].items()
        }
        return packed

    @engine
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's AdamW. The rows themselves must be those of the same moment."""
        self.settle()
        if self.team is not None:
            self.team.before_and_after_loading()  # what one writes now another would take for steps to catch up with
        super().load_state_dict(state_dict)
        steps = [float(s["step"].max()) for s in self.state.values() if "step" in s]
        self.steps_done = int(max(steps, default=0))
        group = self.param_groups[0]
        self._schedule = Schedule(self.steps_done, group["betas"], group["eps"])
        for updates in self.updates:
            updates.take_loaded()
        if self.team is not None:
            self.team.before_and_after_loading()


class DenseRowAdamW(RowAdamW):
    """torch.optim.AdamW over every row of the stores; late for rows that nothing reads."""

    def assume_steady(self, behind: float) -> None:
        """For simulations, whose tensors hold no step counts to tell which rows are behind: as in a steady step of
        training, each step leaves this share of all rows behind. All keys are caught up after it, as the next step
        reads them; values when they first move."""
        for updates in self.updates:
            updates.behind = behind


class LazyRowAdamW(RowAdamW):
    """AdamW on touched rows only, each with its own step count (routers, touched by every token, are updated whole)."""

    each_row_counts = True


ROW_ADAM = {"dense": DenseRowAdamW, "lazy": LazyRowAdamW}
