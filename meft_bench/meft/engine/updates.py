"""What an optimizer step does to the rows of one store, now or later (adam.py says why later)."""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from meft_bench.meft.engine import adamw, memory
from meft_bench.meft.engine.partners import Optimizer
from meft_bench.meft.engine.router_updates import RouterUpdates
from meft_bench.meft.engine.schedule import lazy_table
from meft_bench.meft.store import NeuronStore

_PIECE = 256
"""Rows that are updated in the background before more urgent work of another layer gets in between."""


class StoreUpdates:
    """The Adam state of one store and its rows that were left behind. counted: each row has a step count of its own."""

    def __init__(self, store: NeuronStore, optimizer: Optimizer, number: int, counted: bool) -> None:
        self.store, self.optimizer, self.number, self.counted = store, optimizer, number, counted
        self.moments_RH2D: Tensor | None = None  # [R, halves, 2, D]: m and v of a row lie together
        self.share = store.share
        """What ranks share of it; then this rank makes the steps of its own rows."""
        neurons, device = store.touched_R.shape[0], store.touched_R.device
        self._halves = ["keys", "values"] if store.trains_keys else ["values"]
        self._done_RH = torch.zeros(neurons, len(self._halves), dtype=torch.int32, device=device)
        self._still_RH = torch.zeros(neurons, len(self._halves), dtype=torch.bool, device=device)
        self._read_R = torch.zeros(neurons, dtype=torch.bool, device=device)
        """Rows whose keys were read since the last step."""
        self._known_RH = self._done_RH
        """As far as this rank knows that rows are current: others bring some up to date."""
        if self.share is not None:
            tensors = self.share.tensors
            self._done_RH, self._still_RH, self._read_R = tensors["done"], tensors["still"], tensors["read"]
            self.moments_RH2D = tensors["moments"]
        self._withstood: tuple[int, float] | None = None
        """The schedule (by its first step) and the rate that still rows were tested at."""
        self._written = store.written
        """As far as this has noticed what others wrote."""
        self.steps = 0
        self.constants: adamw.Steps | None = None
        self.behind: float | None = None
        """The share of all rows that each step leaves behind, where it is assumed (DenseRowAdamW.assume_steady)."""
        self._drifted = False
        self._rests = store.rests
        self._router = RouterUpdates(store, optimizer, self.salt("router")) if store.trains_router else None
        self._names = [*self._halves, *(["router"] if self._router else [])]
        store.updates = self

    # ---- steps ----

    def take_over(self) -> None:
        """On the caller's thread, before a step: rows follow this optimizer from now on. What another has put off is
        made first, and what it did since is taken as what others write. Raises RuntimeError where a later optimizer has
        moved the rows to other memory, and ValueError where keys or values train no more, or do so only now."""
        store = self.store
        if self.share is not store.share:
            raise RuntimeError("another optimizer of these rows has put them into other memory since: step that one")
        if store.trains_keys != ("keys" in self._halves) or not store.handle("values").requires_grad:
            raise ValueError(f"{store.queue.name}: keys or values were frozen, or set free, after the optimizer was "
                             "made: make it anew")  # fmt: skip
        if self._router is not None and not store.trains_router:
            store.come_home()  # its optimizer may be on the device
        if store.updates is not self:
            store.settle()
            store.updates = self
            store.mark_changed()

    def prepare(self) -> None:
        """On the caller's thread, before the step is queued: state that readers of the optimizer expect to find."""
        store, state = self.store, self.optimizer.state
        store.prepare_gradients()
        for name in self._names:
            parameter = store.handle(name)
            if not state[parameter]:
                self._make_state(name, parameter)
            state[parameter]["step"] = self._counted(name, state[parameter]["step"])

    @property
    def trained(self) -> list[str]:
        """The parameters that a step changes: a router that was frozen since stays as it is."""
        return [name for name in self._names if name != "router" or self.store.trains_router]

    def _counted(self, name: str, step: Tensor) -> Tensor:
        """The step count after the step to come; a lazy row's is raised where the row is updated."""
        return step if self.counted and name != "router" else step + 1

    def _make_state(self, name: str, parameter: nn.Parameter) -> None:
        optimizer = self.optimizer
        if name == "router" and self.share is not None:
            first, second = self.share.tensors["router first"], self.share.tensors["router second"]
        elif name == "router":
            first, second = (torch.zeros_like(parameter, dtype=optimizer.moments) for _ in range(2))
        else:
            if self.moments_RH2D is None:
                shape = (parameter.shape[0], len(self._halves), 2, parameter.shape[1])
                self.moments_RH2D = memory.zeros(shape, optimizer.moments, parameter.device)
            both = self.moments_RH2D[:, self._halves.index(name)]
            first, second = both[:, 0], both[:, 1]
        counted = self.counted and name != "router"
        step = torch.zeros(parameter.shape[:1] if counted else (), device=parameter.device if counted else "cpu")
        if counted and self.share is not None:
            step = self.share.tensors[f"{name} steps"]
        optimizer.state[parameter].update(step=step, exp_avg=first, exp_avg_sq=second)

    @torch.no_grad()
    def step(self, step: int, constants: adamw.Steps, lr: float, weight_decay: float) -> Iterator[None]:
        """The update of one optimizer step, in pieces where it runs in the background."""
        store = self.store
        self._watch(stepping=True)
        store.grads.watch()
        store.version += 1
        store.writes += 1
        if self.counted:
            touched_U = store.touched_R.nonzero()[:, 0]
            yield from self._lazy_step(self._own(touched_U), constants, lr, weight_decay)
        else:
            touched_U = yield from self._dense_step(step, constants, weight_decay)
        store.changed_R[touched_U] = store.version
        if store.away is None and self._router is not None and store.trains_router:
            self._router.step(step, constants, touched_U)
        store.wrote()
        store.touched_R.zero_()
        if self.share is not None:
            # Before the other ranks go on: nobody waits for a key that this one can catch up now.
            yield from self.refresh_read_keys()
            self.share.stepped()
        if store.away is not None:
            store.away.step(step, constants, lr, weight_decay)

    def _own(self, rows_U: Tensor) -> Tensor:
        """Those of these rows whose steps this rank makes: all of them in a process alone."""
        return rows_U if self.share is None else self.share.own(rows_U)

    def _dense_step(self, step: int, constants: adamw.Steps, weight_decay: float) -> Generator[None, None, Tensor]:
        tested = constants.first, constants.withstood
        if weight_decay != 0 or tested != self._withstood:
            self._wake()
            self._withstood = tested
        touched_U, grads, listed = self._gradients(None)
        now = constants.resting(but_last=True) if self._rests else constants
        # With it the steps that these rows missed, if nobody read them before they got here.
        yield from self._updated(grads, self._own(touched_U), step, now, listed)
        self.steps, self.constants, self._drifted = step, constants, False
        if self._rests:
            self.constants = constants.resting(but_last=False)
            self._still_RH[touched_U] = True  # what it misses changes its moments alone
        return touched_U

    def _gradients(self, touched_U: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """(rows, of those given or of all that have a gradient; the gradients; whether in the order of these rows)."""
        grads = self.store.grads
        if grads.arrived is not None and (touched_U is None or touched_U.numel()):
            rows_U, given, listed = grads.arrived.rows_U, grads.arrived.grads_UHD, True
        else:
            rows_U, given, listed = (
                grads.filled_rows() if touched_U is None else touched_U,
                self.store.gradients(),
                False,
            )
        assert given.shape[1] == len(self._halves) or not rows_U.numel(), "keys were frozen, or not, since"
        return rows_U, given, listed

    def _updated(
        self, grads: Tensor, rows_U: Tensor, step: int | None, constants: adamw.Steps, listed: bool
    ) -> Iterator[None]:
        rows, factor = self.rows(), self.store.grads.factor
        for start, some_U in self._pieces(rows_U):
            part = grads[start : start + some_U.shape[0]] if listed else grads
            adamw.advance(rows, part, some_U, step, constants, factor, listed)
            yield

    def _pieces(self, rows_U: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place of its first row, some of the rows), until all were given: all at once unless in the background."""
        size = _PIECE if self.store.queue.background else max(1, rows_U.shape[0])
        for number, some_U in enumerate(rows_U.split(size)):
            yield number * size, some_U

    def _lazy_step(self, touched_U: Tensor, settings: adamw.Steps, lr: float, weight_decay: float) -> Iterator[None]:
        """settings: betas and eps as they were when the step was queued."""
        most = 0
        for half in self._halves:
            counts_R = self.optimizer.state[self.store.handle(half)]["step"]
            counts_R[touched_U] += 1
            own_U = touched_U if self.share is not None else slice(None)  # others raise theirs meanwhile
            most = max(most, int(counts_R[own_U].max()) if counts_R[own_U].numel() else 0)
        betas = settings.beta1, settings.beta2
        constants = adamw.Steps(lazy_table(most, lr, betas, weight_decay), 0, *betas, settings.eps, lr)
        rows_U, grads, listed = self._gradients(touched_U)
        yield from self._updated(grads, rows_U, None, constants, listed)

    def rows(self) -> adamw.RowState:
        """All rows and their state [R, H, D], where they lie; they may be behind."""
        moments_RH2D = self.moments_RH2D
        assert moments_RH2D is not None
        rows_RHD = self.store.rows_R2D[:, 2 - len(self._halves) :]
        moments = moments_RH2D[:, :, 0], moments_RH2D[:, :, 1]
        return adamw.RowState(rows_RHD, *moments, self._done_RH, self._still_RH, self.salt(self._halves[0]))

    def state(self, name: str) -> adamw.RowState:
        """A parameter's part of it, or the router's."""
        if name == "router":
            assert self._router is not None
            return self._router.state()
        return self.rows().half(self._halves.index(name))

    def salt(self, name: str) -> int:
        """RowState.salt."""
        return 3 * self.number + ("keys", "values", "router").index(name)

    # ---- rows whose optimizer is on the device (engine/device_adam.py) ----

    @torch.no_grad()
    def hand_over(self, rows_U: Tensor) -> None:
        """Make all steps of these rows: the device goes on from there."""
        self._watch()
        self._still_RH[rows_U] = False
        if not self.counted:
            self._advance(rows_U, len(self._halves))

    def counts(self, half: str) -> Tensor:
        """The steps of each row, int32 [R], where rows count their own."""
        return self._done_RH[:, self._halves.index(half)]

    def take_back(self, half: str, rows_U: Tensor, counts_U: Tensor | None) -> None:
        """These rows are home again; counts_U as counts()."""
        place = self._halves.index(half)
        self._done_RH[rows_U, place] = self.steps if counts_U is None else counts_U
        self._still_RH[rows_U, place] = False
        if counts_U is not None:
            self.optimizer.state[self.store.handle(half)]["step"][rows_U] = counts_U.float()

    # ---- rows left behind ----

    @torch.no_grad()
    def refresh_keys(self, index_U: Tensor | None) -> None:
        if self.behind is None and "keys" in self._halves and not self.counted and not self._rests:
            self._read_R[slice(None) if index_U is None else index_U] = True
            self._advance(index_U, 1)

    @torch.no_grad()
    def refresh_read_keys(self) -> Iterator[None]:
        """Bring the keys up to date that were read since the last step, as they will be again, before somebody waits
        for them; in pieces. The result is that of refresh_keys, whenever it runs."""
        if "keys" not in self._halves or self.counted or self._rests:
            return
        self.store.watch()
        if self.behind is not None:
            for _, some_U in self._pieces(self._assumed_behind(self._read_R.shape[0])):
                self._catch_up(self.state("keys"), some_U)
                yield
            return
        # Other ranks clear their marks meanwhile, and nonzero() counts twice: of marks that nobody changes.
        read_R = self._read_R if self.share is None else self._read_R & self.share.mine_R
        read_U = read_R.nonzero()[:, 0]
        self._read_R[read_U] = False
        for _, some_U in self._pieces(read_U):
            self._make_late(some_U, 1)
            yield

    @torch.no_grad()
    def refresh(self, index_U: Tensor | None) -> None:
        if self.counted or self._rests:
            return  # weights are never behind, moments of resting rows until finish()
        if None not in (self.behind, self.constants) and not self._drifted:
            self._drifted = True
            rows = self._done_RH.shape[0] if index_U is None else index_U.shape[0]
            self._catch_up(self.state("values"), self._assumed_behind(rows))
        self._advance(index_U, len(self._halves))

    @torch.no_grad()
    def finish(self) -> None:
        """Bring all rows up to date, and the moments of still ones too."""
        self._watch()
        with self._alone():
            self._wake()
        self._advance(None, len(self._halves))
        if self._router is not None:
            self._router.finish()

    def _watch(self, stepping: bool = False) -> None:
        """Notice what others wrote into rows. Which of them are still was found of what stood there before: the steps
        that these have missed are made of their moments alone, and what stands there now is tested. stepping: other
        ranks do so for their rows."""
        self.store.watch()
        written, self._written = self._written != self.store.written, self.store.written
        if not written or self.constants is None or self._rests or self.behind is not None:
            return
        rows, resting = self.rows(), self.constants.resting(but_last=False)
        with self._alone():
            for half in range(len(self._halves)):
                still_U = self._still_RH[:, half].nonzero()[:, 0]
                still_U = self._own(still_U) if stepping else still_U
                self._still_RH[still_U, half] = False
                adamw.advance(rows.half(half), None, still_U, self.steps, resting)

    def _alone(self) -> AbstractContextManager[None]:
        return nullcontext() if self.share is None else self.share.alone()

    def _wake(self) -> None:
        """What rows were found still against no longer holds: all are looked at again."""
        self._still_RH.zero_()

    def _advance(self, index_U: Tensor | None, halves: int) -> None:
        """Make the missed steps of the first `halves` halves of these rows (of all: None)."""
        with self._alone():
            self._make_late(index_U, halves)
        if self.share is not None:
            self._notice(index_U)

    def _notice(self, index_U: Tensor | None) -> None:
        """Copies of rows that other ranks have brought up to date are made anew."""
        index_U = torch.arange(self._done_RH.shape[0]) if index_U is None else index_U
        done_UH = self._done_RH[index_U]
        moved_U = (done_UH != self._known_RH[index_U]).any(1)
        self.store.changed_R[index_U[moved_U]] = self.store.version
        self._known_RH[index_U] = done_UH

    def _make_late(self, index_U: Tensor | None, halves: int) -> None:
        """_advance() where nobody else does so."""
        constants = self.constants
        if self.behind is not None or constants is None or self.steps <= constants.first:
            return
        late_R = ((self._done_RH < self.steps) & ~self._still_RH)[:, :halves].any(1)
        late_U = late_R.nonzero()[:, 0] if index_U is None else index_U[late_R[index_U]]
        if late_U.numel():
            rows = self.rows()
            self._catch_up(rows if halves == len(self._halves) else rows.half(0), late_U)

    def _assumed_behind(self, rows: int) -> Tensor:
        """As many numbers as the assumed share of so many rows."""
        assert self.behind is not None
        return torch.arange(round(self.behind * rows))

    def _catch_up(self, rows: adamw.RowState, late_U: Tensor) -> None:
        """Make the missed steps of these rows."""
        assert self.constants is not None
        with self.store.queue.must_end():
            adamw.advance(rows, None, late_U, self.steps, self.constants)
            self.store.wrote()
            self.store.changed_R[late_U] = self.store.version

    def take_loaded(self) -> None:
        """After load_state_dict: moments into our buffers, every row as far as the loaded step. What was not loaded (a
        state from before the first step holds nothing) is zero."""
        self.steps, self.constants = self.optimizer.steps_done, None
        self.moments_RH2D = None if self.share is None else self.share.tensors["moments"]
        if self._router is not None:
            self._router.take_loaded(self.steps)
        for name in self._names:
            parameter = self.store.handle(name)
            loaded = dict(self.optimizer.state[parameter])
            self._make_state(name, parameter)
            entry = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key].copy_(loaded[key]) if loaded else entry[key].zero_()
            counted = self.counted and name != "router"
            given = loaded.get("step", torch.zeros_like(entry["step"])).float()
            given = given.to(parameter.device if counted else "cpu").clone()
            entry["step"] = entry["step"].copy_(given) if counted and self.share is not None else given
            if name != "router":
                half = self._halves.index(name)
                self._done_RH[:, half] = entry["step"] if counted else self.steps
                self._still_RH[:, half] = False
