"""What an optimizer step does to the router of one store, for updates.py."""

import torch

from meft_bench.meft.engine import adamw
from meft_bench.meft.engine.partners import Optimizer
from meft_bench.meft.store import NeuronStore


class RouterUpdates:
    """AdamW of all rows of a router; where rows rest (NeuronStore.rests), of those of the experts that a step touches.
    salt is RowState's."""

    def __init__(self, store: NeuronStore, optimizer: Optimizer, salt: int) -> None:
        assert store.router is not None
        experts, device = store.router.shape[0], store.touched_R.device
        self._store, self._optimizer, self._salt = store, optimizer, salt
        self._done_N = torch.zeros(experts, dtype=torch.int32, device=device)
        self._still_N = torch.zeros(experts, dtype=torch.bool, device=device)
        self._all_N = torch.arange(experts, device=device)
        self._steps = 0
        self._resting: adamw.Steps | None = None
        """The steps that resting rows have missed, so far as they change moments."""

    def step(self, step: int, constants: adamw.Steps, touched_U: torch.Tensor) -> None:
        """Make a step; touched_U: the neurons that it updates."""
        store, own_N, factor = self._store, self._all_N, 1.0
        grad_ND, self._steps = store.router_gradient(), step
        if store.share is not None:
            own_N, factor = store.share.mine_N, store.share.router_factor
        if store.rests:
            size = store.touched_R.shape[0] // own_N.shape[0]
            own_N, self._resting = (touched_U // size).unique(), constants.resting(but_last=False)
            constants = constants.resting(but_last=True)
        else:
            self._done_N.fill_(step - 1)
        adamw.advance(self.state(), grad_ND, own_N, step, constants, factor)

    def finish(self) -> None:
        """Bring the moments of resting rows up to date."""
        if self._resting is not None:
            self._still_N.zero_()
            adamw.advance(self.state(), None, self._all_N, self._steps, self._resting)

    def state(self) -> adamw.RowState:
        """The router with its moments, where they lie."""
        state = self._optimizer.state[self._store.handle("router")]
        return adamw.RowState(
            self._store.router_ND, state["exp_avg"], state["exp_avg_sq"], self._done_N, self._still_N, self._salt
        )

    def take_loaded(self, steps: int) -> None:
        """Moments were loaded that are so many steps far."""
        self._resting = None
        self._done_N.fill_(steps)
