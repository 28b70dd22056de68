"""AdamW over the rows of neuron stores, its moments beside the rows in host memory.

"dense" follows torch's AdamW over all rows: a row without a gradient has a zero one, its moments decay and it drifts.
Those updates are made late, when something reads the row, and then one by one (kernels.advance), so the trajectory is
the same to the last bit as if every row had been updated at every step, while a step costs what its rows cost. "lazy"
updates the rows of S alone, each with its own step count; the rest neither decay nor move.

A step may run in the background (the stores' queues): it returns at once, and whoever reads rows waits for it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft.engine import kernels, memory
from meft_bench.meft.engine.device_adam import squares_elsewhere
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.schedule import Schedule, check_number, check_settings, lazy_table
from meft_bench.meft.engine.workers import UPDATE
from meft_bench.meft.store import NeuronStore

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NORM_ROWS = 256  # rows copied at once when gradients are summed or scaled


class RowAdamW(torch.optim.Optimizer):
    """Common part of DenseRowAdamW and LazyRowAdamW; takes the stores' parameters as one group.

    State per parameter, as in torch.optim.AdamW: exp_avg and exp_avg_sq (shape of the parameter; fp32, or bf16 with
    stochastic rounding for moments="bf16") and step (scalar fp32; [R] fp32 for "lazy"). Without weight decay unless
    given, as the paper. state_dict() brings all rows up to date first.
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
            store.settle()
            store.prepare_gradients()
        parameters = [p for store in self.stores for p in store.parameters() if p.requires_grad]
        super().__init__(parameters, settings)
        self.moments, self.steps_done = MOMENTS[moments], 0
        self._schedule = Schedule(0, betas, eps)
        self.updates = [StoreUpdates(store, self, number) for number, store in enumerate(self.stores)]
        for store in self.stores:
            store.looked_at = False

    @torch.no_grad()
    @observe.announced("adam")
    @engine
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; closure is not supported. In the background where the stores' queues are."""
        assert closure is None, "row-wise AdamW takes no closure"
        group = self.param_groups[0]
        check_settings(group)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        if not self._schedule.goes_on(group):
            self.settle()  # the old constants end here
            self._schedule = Schedule(self.steps_done, group["betas"], group["eps"])
        self._schedule.add(self.steps_done + 1, lr, weight_decay)
        self.steps_done += 1
        constants = self._schedule.constants()
        for updates in self.updates:
            updates.store.collect()
            updates.prepare()
            updates.store.queue.submit(updates.step, self.steps_done, constants, lr, weight_decay, priority=UPDATE)
            updates.store.stepped()

    @engine
    def settle(self) -> None:
        """Wait for background work and bring every row and its moments home and up to date."""
        for updates in self.updates:
            updates.store.come_home()
            updates.finish()

    @observe.announced("adam")
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero in place: the gradient buffers are part of the store. Where device_budget pays for it, the optimizer of
        rows then goes to the device."""
        for updates in self.updates:
            updates.store.clear_gradients()
            source = updates.store.source() if updates.store.source is not None else None
            if source is not None and self.steps_done:
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
        super().load_state_dict(state_dict)
        steps = [float(s["step"].max()) for s in self.state.values() if "step" in s]
        self.steps_done = int(max(steps, default=0))
        group = self.param_groups[0]
        self._schedule = Schedule(self.steps_done, group["betas"], group["eps"])
        for updates in self.updates:
            updates.take_loaded()


class DenseRowAdamW(RowAdamW):
    """torch.optim.AdamW over every row of the stores; late for rows that nothing reads."""

    def assume_steady(self) -> None:
        """For simulations, whose tensors hold no step counts to tell which rows are behind: from now on every probed
        key is caught up whenever it is read, and every value when it moves, as in a steady step of training."""
        for updates in self.updates:
            updates.steady = True


class LazyRowAdamW(RowAdamW):
    """AdamW on touched rows only, each with its own step count (routers, touched by every token, are updated whole)."""

    each_row_counts = True


ROW_ADAM = {"dense": DenseRowAdamW, "lazy": LazyRowAdamW}


class StoreUpdates:
    """The Adam state of one store and its rows that were left behind."""

    def __init__(self, store: NeuronStore, optimizer: RowAdamW, number: int) -> None:
        self.store, self.optimizer, self.number = store, optimizer, number
        self.moments_RH2D: Tensor | None = None  # [R, halves, 2, D]: m and v of a row lie together
        neurons, device = store.touched_R.shape[0], store.touched_R.device
        self._halves = ["keys", "values"] if store.trains_keys else ["values"]
        self._done = {half: torch.zeros(neurons, dtype=torch.int32, device=device) for half in self._halves}
        self._still = {half: torch.zeros(neurons, dtype=torch.bool, device=device) for half in self._halves}
        self._withstood: tuple[int, float] | None = None
        """The schedule (by its first step) and the rate that still rows were tested at."""
        self.steps = 0
        self.constants: kernels.Steps | None = None
        self.steady = False
        """Whether which rows are behind is assumed (DenseRowAdamW.assume_steady)."""
        self._router: dict[str, Tensor] = {}
        if store.router is not None and store.router.requires_grad:
            experts = store.router.shape[0]
            self._router = {
                "done": torch.zeros(experts, dtype=torch.int32, device=device),
                "still": torch.zeros(experts, dtype=torch.bool, device=device),
                "all": torch.arange(experts, device=device),
            }
        self._names = [*self._halves, *(["router"] if self._router else [])]
        store.updates = None if optimizer.each_row_counts else self

    # ---- steps ----

    def prepare(self) -> None:
        """On the caller's thread, before the step is queued: state that readers of the optimizer expect to find."""
        store, state = self.store, self.optimizer.state
        store.prepare_gradients()
        for name in self._names:
            parameter = store.handle(name)
            if not state[parameter]:
                self._make_state(name, parameter)
            state[parameter]["step"] = self._counted(name, state[parameter]["step"])

    def _counted(self, name: str, step: Tensor) -> Tensor:
        """The step count after the step to come; a lazy row's is raised where the row is updated."""
        return step if self.optimizer.each_row_counts and name != "router" else step + 1

    def _make_state(self, name: str, parameter: nn.Parameter) -> None:
        optimizer = self.optimizer
        if name == "router":
            first, second = (torch.zeros_like(parameter, dtype=optimizer.moments) for _ in range(2))
        else:
            if self.moments_RH2D is None:
                shape = (parameter.shape[0], len(self._halves), 2, parameter.shape[1])
                self.moments_RH2D = memory.zeros(shape, optimizer.moments, parameter.device)
            both = self.moments_RH2D[:, self._halves.index(name)]
            first, second = both[:, 0], both[:, 1]
        counted = optimizer.each_row_counts and name != "router"
        step = torch.zeros(parameter.shape[:1] if counted else (), device=parameter.device if counted else "cpu")
        optimizer.state[parameter].update(step=step, exp_avg=first, exp_avg_sq=second)

    @torch.no_grad()
    def step(self, step: int, constants: kernels.Steps, lr: float, weight_decay: float) -> None:
        """The update of one optimizer step."""
        store = self.store
        store.watch()
        store.watch_gradients()
        store.version += 1
        store.writes += 1
        if self.optimizer.each_row_counts:
            touched_U = store.touched_R.nonzero()[:, 0]
            self._lazy_step(touched_U, lr, weight_decay)
        else:
            tested = constants.first, constants.withstood
            if weight_decay != 0 or tested != self._withstood:
                self._wake()
                self._withstood = tested
            touched_U = store.filled_rows()
            self._advance(touched_U, self._halves, step - 1, constants)  # rows that nobody read before they got here
            for half in self._halves:
                grads_RD = store.gradients()[:, self._halves.index(half)]
                kernels.advance(self.state(half), grads_RD, touched_U, step, constants)
            self.steps, self.constants = step, constants
        store.changed_R[touched_U] = store.version
        if store.away is None and self._router:
            self._router_step(step, constants)
        store.wrote()
        store.touched_R.zero_()
        if store.away is not None:
            store.away.step(step, constants, lr, weight_decay)

    def _lazy_step(self, touched_U: Tensor, lr: float, weight_decay: float) -> None:
        for half in self._halves:
            counts_R = self.optimizer.state[self.store.handle(half)]["step"]
            counts_R[touched_U] += 1
            group = self.optimizer.param_groups[0]
            most = int(counts_R.max()) if counts_R.numel() else 0
            table = lazy_table(most, lr, group["betas"], weight_decay)
            beta1, beta2 = group["betas"]
            constants = kernels.Steps(table, 0, beta1, beta2, group["eps"], lr)
            grads_RD = self.store.gradients()[:, self._halves.index(half)]
            kernels.advance(self.state(half), grads_RD, touched_U, None, constants)

    def _router_step(self, step: int, constants: kernels.Steps) -> None:
        self._router["done"].fill_(step - 1)
        grad_ND = self.store.router_gradient()
        kernels.advance(self.state("router"), grad_ND, self._router["all"], step, constants)

    def state(self, name: str) -> kernels.RowState:
        """A parameter's rows and their Adam state; they may be behind."""
        state = self.optimizer.state[self.store.handle(name)]
        moments = state["exp_avg"], state["exp_avg_sq"]
        if name == "router":
            done, still = self._router["done"], self._router["still"]
            return kernels.RowState(self.store.router_ND, *moments, done, still, self.salt(name))
        rows_RD = self.store.rows_R2D[:, 0 if name == "keys" else 1]
        return kernels.RowState(rows_RD, *moments, self._done[name], self._still[name], self.salt(name))

    def salt(self, name: str) -> int:
        """RowState.salt."""
        return 3 * self.number + ("keys", "values", "router").index(name)

    # ---- rows whose optimizer is on the device (engine/device_adam.py) ----

    @torch.no_grad()
    def hand_over(self, rows_U: Tensor) -> None:
        """Make all steps of these rows: the device goes on from there."""
        self.store.watch()
        for still_R in self._still.values():
            still_R[rows_U] = False
        if not self.optimizer.each_row_counts:
            self._advance(rows_U, self._halves, self.steps, self.constants)

    def counts(self, half: str) -> Tensor:
        """The steps of each row, int32 [R], where rows count their own."""
        return self._done[half]

    def take_back(self, half: str, rows_U: Tensor, counts_U: Tensor | None) -> None:
        """These rows are home again; counts_U as counts()."""
        self._done[half][rows_U] = self.steps if counts_U is None else counts_U
        self._still[half][rows_U] = False
        if counts_U is not None:
            self.optimizer.state[self.store.handle(half)]["step"][rows_U] = counts_U.float()

    # ---- rows left behind ----

    @torch.no_grad()
    def refresh_keys(self, index_U: Tensor | None) -> None:
        if self.steady:
            self._drift("keys", index_U)
        elif "keys" in self._halves:
            self._advance(index_U, ["keys"], self.steps, self.constants)

    @torch.no_grad()
    def refresh(self, index_U: Tensor | None) -> None:
        if self.steady and index_U is not None:
            self._drift("values", index_U)
        self._advance(index_U, self._halves, self.steps, self.constants)

    @torch.no_grad()
    def finish(self) -> None:
        """Bring all rows up to date, and the moments of still ones too."""
        self.store.watch()
        self._wake()
        self._advance(None, self._halves, self.steps, self.constants)

    def _wake(self) -> None:
        """What rows were found still against no longer holds: all are looked at again."""
        for still_R in self._still.values():
            still_R.zero_()

    def _advance(self, index_U: Tensor | None, halves: list[str], step: int, constants: kernels.Steps | None) -> None:
        """Make the missed steps of these rows (of all: None) up to and with `step`."""
        if self.steady or constants is None or step <= constants.first:
            return
        for half in halves:
            late_R = (self._done[half] < step) & ~self._still[half]
            if index_U is None:
                late_U = late_R.nonzero()[:, 0]
            else:
                late_U = index_U[late_R[index_U]]
            if late_U.numel():
                self.catch_up(half, late_U, step, constants)

    def _drift(self, half: str, index_U: Tensor | None) -> None:
        if self.constants is not None:  # a first step is behind
            late_U = torch.arange(self.store.touched_R.shape[0]) if index_U is None else index_U
            self.catch_up(half, late_U, self.steps, self.constants)

    def catch_up(self, half: str, late_U: Tensor, step: int, constants: kernels.Steps) -> None:
        """Make the missed steps of these rows of "keys" or "values"."""
        kernels.advance(self.state(half), None, late_U, step, constants)
        self.store.wrote()
        self.store.changed_R[late_U] = self.store.version

    def take_loaded(self) -> None:
        """After load_state_dict: moments into our buffers, every row as far as the loaded step."""
        self.steps, self.constants, self.moments_RH2D = self.optimizer.steps_done, None, None
        for name in self._names:
            parameter = self.store.handle(name)
            loaded = dict(self.optimizer.state[parameter])
            if not loaded:
                continue
            self._make_state(name, parameter)
            entry = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key].copy_(loaded[key])
            counted = self.optimizer.each_row_counts and name != "router"
            entry["step"] = loaded["step"].float().to(parameter.device if counted else "cpu").clone()
            if name != "router":
                self._done[name].copy_(entry["step"] if counted else torch.full_like(self._done[name], self.steps))
                self._still[name].zero_()


# ---- clipping ----


@torch.no_grad()
@engine
def clip_grad_norm(stores: Iterable[NeuronStore], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ over all gradients of the stores, at the cost of the rows that have one.

    Returns the norm before clipping (scalar fp32). Waits for gradients on their way. As torch's, an infinite max_norm
    only measures, and a norm of NaN makes every gradient NaN. Raises ValueError for a max_norm that is NaN or negative.
    """
    if max_norm != math.inf:
        check_number("max_norm", max_norm)
    squares = torch.zeros((), dtype=torch.float64)
    parts: list[tuple[NeuronStore, Tensor]] = []
    for store in stores:
        store.prepare_gradients()
        store.queue.wait()
        filled_U = store.filled_rows()
        parts.append((store, filled_U))
        for some_U in filled_U.split(_NORM_ROWS):
            squares += torch.linalg.vector_norm(store.gradients()[some_U]).double().square().cpu()
        if store.trains_router:
            squares += torch.linalg.vector_norm(store.router_gradient()).double().square().cpu()
    away = [store.away for store, _ in parts if store.away is not None]
    if away:
        squares += squares_elsewhere(away)
    norm = squares.sqrt().float()
    factor = max_norm / (float(norm) + 1e-6)
    if not factor >= 1:
        for rows in away:
            rows.scale(factor)
    if math.isnan(factor):
        for store, _ in parts:
            store.fill_gradients(math.nan)
    elif factor < 1:
        for store, filled_U in parts:
            gradients = store.gradients()
            for some_U in filled_U.split(_NORM_ROWS):
                gradients[some_U] = gradients[some_U] * factor
            store.wrote_gradients()
            if store.trains_router:
                store.router_gradient().mul_(factor)
    return norm
