"""NeuronStore: one layer's neurons (keys, values, router) with their gradients, in the memory the config names."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.dense import fresh_keys
from meft_bench.meft.engine import kernels, memory, shown_gradients
from meft_bench.meft.engine.gradients import RowGradients
from meft_bench.meft.engine.handle import bind, engine
from meft_bench.meft.engine.partners import Away, Source, Updates
from meft_bench.meft.engine.share import StoreShare
from meft_bench.meft.engine.team import Team
from meft_bench.meft.engine.workers import UPDATE, HostQueue
from meft_bench.meft.routing import fresh_router


class NeuronStore(nn.Module):
    """keys [R, D], values [R, D] and, with Key-Experts, router [N, D]; fp32 parameters with dense gradients.

    Row i of both matrices is one neuron, and both lie in one buffer [R, 2, D], so a neuron is one contiguous row; their
    gradients likewise. The store stays in its memory and dtype: .to(), .cuda() and .half() of the model pass it by. An
    optimizer may leave rows behind that nothing reads: any use of a parameter brings them up to date first
    (engine/handle.py); memory taken out of one earlier (.data, .detach()) needs settle().
    """

    @engine
    def __init__(self, config: MeftOptions, hidden_size: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        keys_RD = fresh_keys(config.neurons, hidden_size, generator, config.key_std)
        # Values start at zero: the model is unchanged at step 0 and the first step moves values only.
        self._rows_R2D = memory.zeros((config.neurons, 2, hidden_size), torch.float32, device)
        self._rows_R2D[:, 0] = keys_RD
        self.keys = nn.Parameter(self._rows_R2D[:, 0], requires_grad=not config.frozen_keys)
        self.values = nn.Parameter(self._rows_R2D[:, 1])
        self.register_parameter("router", None)
        if config.key_experts:
            router_ND = fresh_router(keys_RD, config, generator)
            self.router = nn.Parameter(router_ND.to(device), requires_grad=config.trains_router)
        self.rests = config.is_distinctive
        """Whether a row without a gradient keeps its bits in an optimizer step, whatever its moments."""
        self.queue = HostQueue("one adapter layer")
        self.grads = RowGradients(config.neurons, device)
        self._router_grad_ND: Tensor | None = None
        self.updates: Updates | None = None
        self.source: weakref.ref[Source] | None = None
        self.away: Away | None = None
        self.share: StoreShare | None = None
        """What the ranks of this node share of it, and their team, where several train it (engine/team.py)."""
        self.team: Team | None = None
        self.looked_at = False
        """Whether somebody used a parameter or a gradient since gradients were last cleared."""
        self._seen: tuple[int, ...] = ()
        self._lent_out = False
        """Whether somebody had a parameter in his hands since rows were last copied: he may have written into it."""
        self.writes = 0
        """Counts optimizer steps, loads and what others were seen to write."""
        self.version = 0
        """Counts the moments at which rows may have changed; changed_R says at which one a row last did."""
        self.changed_R = torch.zeros(config.neurons, dtype=torch.int32, device=device)
        self.written = 0
        """The version at which others may last have written."""

    def _apply(self, fn, recurse=True):
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            bind(value, self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # files want whole tensors, not every second row of a buffer
            for name in ("keys", "values"):
                destination[prefix + name] = destination[prefix + name].contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.lend_out()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.gradients_home()
        self.settle()
        state = {**self.__dict__, "updates": None, "source": None}
        if self.share is not None:  # a copy is this process's own
            fresh = RowGradients(self.grads.filled_R.shape[0], self._rows_R2D.device)
            state |= {"share": None, "team": None, "grads": fresh, "_router_grad_ND": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Parameters that were copied after the count of versions were looked at, which counts on.
        self.version = max(self.version, int(self.changed_R.max()))
        self.mark_changed()
        for parameter in self._parameters.values():
            if parameter is not None:
                bind(parameter, self)

    @property
    @engine
    def rows_R2D(self) -> Tensor:
        """Keys and values as they stand in memory, [R, 2, D]; rows that an optimizer left behind are not waited for."""
        keys, values = self.handle("keys"), self.handle("values")
        if not memory.is_half(keys, self._rows_R2D, 0) or not memory.is_half(values, self._rows_R2D, 1):
            # Somebody put other tensors in place (a loader, a copy of the model): move them into one buffer.
            self._rows_R2D = memory.empty((keys.shape[0], 2, keys.shape[1]), keys.dtype, keys.device)
            if self.share is not None:
                self._rows_R2D = self.share.tensors["rows"]  # where the other ranks look
            self._rows_R2D[:, 0], self._rows_R2D[:, 1] = keys.detach(), values.detach()
            keys.data, values.data = self._rows_R2D[:, 0], self._rows_R2D[:, 1]
        return self._rows_R2D

    def handle(self, name: str) -> nn.Parameter:
        """The parameter "keys", "values" or "router" as an object, whatever the state of its rows."""
        parameter = self._parameters[name]
        assert parameter is not None
        bind(parameter, self)  # a loader may have put it there without a word
        return parameter

    @property
    @engine
    def router_ND(self) -> Tensor:
        """The router as it stands in memory."""
        if self.share is not None:
            self.share.wait()
        return self.handle("router").detach()

    @property
    @engine
    def trains_keys(self) -> bool:
        return self.handle("keys").requires_grad

    @property
    @engine
    def trains_rows(self) -> bool:
        """Whether keys or values get gradients."""
        return self.trains_keys or self.handle("values").requires_grad

    @property
    def trains(self) -> bool:
        """Whether anything gets gradients."""
        return self.trains_rows or self.trains_router

    # ---- rows out ----

    def refresh_keys(self, index_U: Tensor | None = None) -> None:
        """Bring the keys of these rows (of all: None) up to date."""
        self.watch()
        if self.updates is not None:
            self.updates.refresh_keys(index_U)

    def refresh(self, index_U: Tensor | None = None) -> None:
        """Bring keys and values of these rows (of all: None) up to date."""
        self.watch()
        if self.updates is not None:
            self.updates.refresh(index_U)

    def mark_changed(self) -> None:
        """Every row may have changed: copies of rows, wherever they are, are made anew."""
        self.version += 1
        self.written = self.version
        self.changed_R.fill_(self.version)

    def watch(self) -> None:
        """Before the engine reads or writes rows: notice what others wrote, or may have written, into parameters."""
        seen = self._versions()
        if self.share is not None:
            self.share.watch(self, written=seen != self._seen or self._lent_out)
        if seen != self._seen:
            self.writes += 1
        if seen != self._seen or self._lent_out:
            self.mark_changed()
        self._seen, self._lent_out = seen, False

    def put_rows(self, rows_R2D: Tensor) -> None:
        """keys and values lie in this buffer from now on."""
        self._rows_R2D, self._seen = rows_R2D, self._versions()

    def put_router(self, router_ND: Tensor, grad_ND: Tensor | None) -> None:
        """The router, and its gradient (None: made when there is one), lie here from now on."""
        router = self.handle("router")
        router.data, router.grad, self._router_grad_ND = router_ND, None, grad_ND
        self._seen = self._versions()

    def is_at(self, version: int) -> bool:
        """Whether this is still the version of the rows: no step that is done, and nobody else, has changed them."""
        told = self.share is not None and self.share.is_told()
        return self.version == version and not (self._lent_out or told) and self._seen == self._versions()

    def wrote(self) -> None:
        """What has changed since watch() was the engine's own doing."""
        self._seen = self._versions()

    @engine
    def _versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self._parameters.values() if p is not None)

    def lend_out(self) -> None:
        """Somebody is about to use a parameter: bring every row up to date; copies of rows are made anew afterwards."""
        self.settle()
        self._lent_out = True
        if self.share is not None:
            self.share.wrote()  # now, as the other ranks may go on before this one looks what was written

    @observe.announced("gather")
    def gather(self, union_U: Tensor, dtype: torch.dtype = torch.float32, out_UHD: Tensor | None = None) -> Tensor:
        """The union's neurons [U, 2, D] in dtype, keys then values, copied out (into out, if given; an out [U, 1, D]
        takes the values alone)."""
        self.refresh(union_U)
        rows_R2D = self.rows_R2D
        if out_UHD is None:
            out_UHD = torch.empty(union_U.shape[0], *rows_R2D.shape[1:], dtype=dtype, device=rows_R2D.device)
        rows_RX = rows_R2D.flatten(1) if out_UHD.shape[1] == 2 else rows_R2D[:, 1]
        kernels.gather(rows_RX, union_U, out_UHD.flatten(1))
        return out_UHD

    def settle(self) -> None:
        """Finish queued work and bring every row home and up to date."""
        updates = self.__dict__.get("updates")
        if "queue" in self.__dict__:
            self.come_home()
        if updates is not None:
            self.refresh(None)

    def come_home(self) -> None:
        """Finish queued work, wait for other ranks' steps, and bring home the rows whose optimizer is on the device."""
        self.queue.wait()
        if self.share is not None:
            self.share.wait()
        self.looked_at = True
        if self.away is not None:
            self.away.home()

    def finish_queued(self) -> None:
        """Wait for work in the background, if there is any."""
        if "queue" in self.__dict__:
            self.queue.wait()

    # ---- gradients in ----

    @property
    def touched_R(self) -> Tensor:
        """Rows that got a gradient since the optimizer's last step."""
        return self.grads.touched_R

    @observe.announced("gradients")
    @engine
    def add_gradients(self, union_U: Tensor, grads_UHD: Tensor, release: Callable[[], None] | None = None) -> None:
        """Accumulate the gradients [U, 2, D] of the union's keys and values; [U, 1, D], values alone, when keys are
        frozen. fp32, bf16 or fp16. With release, nobody else writes them, they may be kept as they are, and it is
        called once they are not needed any more."""
        if not self.queue.background:
            self.prepare_gradients()
        self.gradients()
        self.grads.add(union_U, grads_UHD, release)

    @observe.announced("gradients")
    @engine
    def add_router_gradient(self, router_ND: Tensor) -> None:
        """Accumulate the router's gradient."""
        if not self.queue.background:
            self.prepare_gradients()
        if self.share is not None:
            self.share.add_router_gradient(router_ND)
        else:
            self.router_gradient().add_(router_ND)

    def gradients_home(self) -> None:
        """Bring home the gradients that wait on the device, wait for those on their way, and write out what the buffer
        does not show yet."""
        self._waiting_home()
        self.grads.write_out()

    def _waiting_home(self) -> None:
        self.come_home()
        self.collect()
        self.queue.wait()

    @engine
    def lend_gradients(self) -> None:
        """Somebody is about to use .grad, and may keep it."""
        if self.share is not None:
            return  # it has no numbers to see (RanksGradient)
        self._waiting_home()
        self.grads.show()

    @engine
    def collect(self) -> None:
        """Send home the gradients that wait on the device."""
        source = self.source() if self.source is not None else None
        if source is not None:
            source.collect()

    def stepped(self) -> None:
        """An optimizer step has been queued: copies on the device follow it."""
        source = self.source() if self.source is not None else None
        if source is not None:
            source.stepped()

    @engine
    def gradients(self) -> Tensor:
        """The memory of the rows' gradients [R, 2, D] ([R, 1, D] when keys are frozen), whose halves are keys.grad and
        values.grad. Only after gradients_home() does it hold what those have to show."""
        values, buffer = self.handle("values"), self.grads.buffer_RHD
        halves = 2 if self.trains_keys else 1
        if buffer is not None and not self.trains_rows:  # frozen for a while: what comes home is of before
            halves = buffer.shape[1]
        return self.grads.buffer(halves, values.shape[1], values.device)

    @engine
    def router_gradient(self) -> Tensor:
        """The router's gradient [N, D]."""
        router = self.handle("router")
        if self._router_grad_ND is None or self._router_grad_ND.device != router.device:
            self._router_grad_ND = torch.zeros_like(router)
        return self._router_grad_ND

    @property
    @engine
    def trains_router(self) -> bool:
        router = self._parameters["router"]
        return router is not None and router.requires_grad

    @engine
    def prepare_gradients(self) -> None:
        """Give every trainable tensor its gradient: a layer that selected nothing has a zero one, as a resident adapter
        would, so that its moments decay all the same. Where somebody set .grad to None since, gradients start anew.

        On the training loop's thread: queued work may still need the old gradients and never looks at .grad.
        """
        if self.share is not None:
            self.share.prepare(self)
        else:
            shown_gradients.prepare(self)

    def clear_router_gradient(self) -> None:
        """Zero the router's gradient, also where the router is frozen for the moment."""
        if self._router_grad_ND is not None and self.away is None:
            self._router_grad_ND.zero_()

    @property
    def has_router_gradient(self) -> bool:
        """Whether the router's gradient is here. While its optimizer is on the device, so is its gradient, and here are
        zeros."""
        return self.trains_router and self.away is None

    def trained(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [p for p in self._parameters.values() if p is not None and p.requires_grad]

    @engine
    def shown_to_autograd(self) -> Tensor:
        """A parameter that trains, if there is one: the values, or keys or router where those are frozen."""
        values = self.handle("values")
        return values if values.requires_grad else next(iter(self.trained()), values)

    @engine
    def squares(self) -> list[Tensor]:
        """Of all gradients here: the sum of squares of each row, fp64, [R] and (with a router that trains) [N]."""
        rows_R = self.grads.squares_R()
        return [rows_R, kernels.squares(self.router_gradient())] if self.has_router_gradient else [rows_R]

    @engine
    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient here by factor, rounded to fp32; the rows' when AdamW or somebody else reads them."""
        self.grads.scale(factor)
        if self.trains_router and self.share is not None:
            self.share.router_factor = factor
        elif self.has_router_gradient:
            self.router_gradient().mul_(factor)

    def fill_gradients(self, value: float) -> None:
        """Set every gradient to value."""
        self.gradients()
        self.grads.fill(value)
        if self.has_router_gradient:
            self.router_gradient().fill_(value)

    def clear_gradients(self) -> None:
        """Forget all gradients, also those on the device, and which rows were touched; .grad shows zeros."""
        self.collect()
        self.prepare_gradients()
        self.queue.submit(shown_gradients.clear, self, True, priority=UPDATE)
        if self.away is not None:
            self.queue.submit(self.away.drop, priority=UPDATE)
