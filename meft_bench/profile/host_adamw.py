"""HostAdamW: the strongest plain peer, AdamW in host memory whose copies overlap everything that they can.

Two operations do the host's work, each in one pass over memory, as the C++ of DeepSpeed's CPUAdam does: an update reads
the 16-bit gradient and writes the 16-bit parameter beside the fp32 weights and moments (28 bytes a parameter), and a
gradient is added to the sums of its micro-batches while their squares are summed. On real tensors both are plain torch
over pieces that stay in cache.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench import observe
from meft_bench.meft.engine.workers import GRADIENTS, HostQueue
from meft_bench.meft.link import GPUS, Link, Transfer

_PIECE = 1 << 16
"""Elements for each thread: 1 MB of weights, moments and gradient. torch gives no thread less than half of it, so that
one such piece alone would keep two threads at work on a host of any size."""
_SCHEMAS = {
    "adamw": "(Tensor(a!) master, Tensor(b!) first, Tensor(c!) second, Tensor gradient, Tensor(d!) out, int step, "
             "float lr, float[] betas, float eps, float weight_decay, float factor) -> ()",
    "add_gradient": "(Tensor(a!) sums, Tensor gradient, bool overwrites) -> Tensor",
}  # fmt: skip


class HostAdamW(torch.optim.Optimizer):
    """AdamW whose fp32 weights and moments lie in host memory; the device keeps the parameters in half precision.

    return_gradients=False: gradients are summed over micro-batches on the device and cross at the step, so a step moves
    2 M elements whatever the accumulation (M the trainable parameters). True: each micro-batch's gradients cross as
    backward makes them and are summed on the host, so the device holds one at a time; A micro-batches move (A + 1) M.
    The second is the schedule of torchao's CPUOffloadOptimizer(offload_gradients=True), which allows one micro-batch
    only, and of ZeRO-Offload. As there, parameters are updated in the order in which backward made their gradients, one
    crosses while the next is updated, and the next forward pass waits for all of them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], return_gradients: bool, lr: float, **settings: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.return_gradients, self.device = return_gradients, parameters[0].device
        self.link, self.queue = Link(), HostQueue("the host's optimizer")
        self.queue.turn(self.device.type in GPUS, self.device)
        self.pairs = [(p, nn.Parameter(p.detach().to("cpu", torch.float32))) for p in parameters]
        self.inner: torch.optim.Optimizer = torch.optim.AdamW([m for _, m in self.pairs], lr=lr, fused=True, **settings)
        self._landed: dict[int, Transfer] = {}
        self._sums: dict[int, Tensor] = {}
        self._filled: set[int] = set()
        self._norms: dict[int, Tensor] = {}
        self._factor = 1.0
        if return_gradients:
            for number, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(functools.partial(self._return, number))

    # ---- gradients ----

    def _return(self, number: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if number in self._landed or number in self._filled:
            self._collect(number)
        elif self.return_gradients:
            self._norms[number] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._landed[number] = self.link.send_to_host(gradient, "grads")
        parameter.grad = None

    def _collect(self, number: int) -> None:
        """Add what landed to the sums over micro-batches."""
        landed = self._landed.pop(number, None)
        if landed is not None:
            self.queue.submit(self._add, number, landed, priority=GRADIENTS)

    def _add(self, number: int, landed: Transfer) -> None:
        gradient = landed.here()
        if number not in self._sums:
            self._sums[number] = torch.empty(gradient.shape, dtype=torch.float32)
        with observe.part("gradients", self):
            squares = _operations().add_gradient(self._sums[number], gradient, number not in self._filled)
        self._filled.add(number)
        self._norms[number] = squares.sqrt()

    def _complete(self) -> None:
        """All gradients of the step are where they are updated from."""
        self.queue.wait()
        for number in self._filled & set(self._landed):
            self._collect(number)
        self.queue.wait()

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_; what is on the host is scaled where it is updated. Returns the norm."""
        if not self.return_gradients:
            return nn.utils.clip_grad_norm_([p for p, _ in self.pairs if p.grad is not None], max_norm)
        self._complete()
        norm = torch.linalg.vector_norm(torch.stack([self._norms[n] for n in sorted(self._norms)])).cpu()
        self._factor = min(1.0, max_norm / (float(norm) + 1e-6)) if math.isfinite(max_norm) else 1.0
        return norm

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fetch gradients that still wait, update on the host, send the new parameters to the device."""
        for number, (parameter, _) in reversed(list(enumerate(self.pairs))):
            if parameter.grad is not None:
                self._return(number, parameter)
        self._complete()
        sent = [self._stepped(number) for number in list(self._order())]
        for transfer in sent:
            transfer.here()
        self._landed.clear()
        self._filled.clear()
        self._norms.clear()
        self._factor = 1.0

    def _order(self) -> Iterator[int]:
        yield from self._landed
        yield from sorted(self._filled - set(self._landed), reverse=True)

    def _stepped(self, number: int) -> Transfer:
        """The new parameter, on its way."""
        parameter = self.pairs[number][0]
        gradient = self._sums[number] if number in self._filled else self._landed[number].here()
        out = self.link.staging(tuple(parameter.shape), parameter.dtype, self.device)
        with observe.part("adam", self.inner):
            self.update(number, gradient, out)
        sent = self.link.send_into(parameter, out, "parameters")
        self.link.release(out)
        return sent

    def update(self, number: int, gradient: Tensor, out: Tensor) -> None:
        """One step of the fp32 weights of this number by their gradient, scaled by the clipping's factor; out takes
        them in the device's dtype."""
        master, group = self.pairs[number][1], self.inner.param_groups[0]
        state = self.inner.state[master]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        state["step"] += 1
        _operations().adamw(
            master.detach(), state["exp_avg"], state["exp_avg_sq"], gradient, out, state["step"], group["lr"],
            group["betas"], group["eps"], group["weight_decay"], self._factor,
        )  # fmt: skip

    @property
    def factor(self) -> float:
        """What clipping scales the gradients of this step by."""
        return self._factor

    def host_state(self) -> dict[str, list[Tensor]]:
        """Host tensors by what they are."""
        moments = [v for s in self.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
        return {
            "adapter parameters": [master for _, master in self.pairs],
            "gradients": list(self._sums.values()),
            "moments": moments,
        }


@cache
def _operations() -> Any:
    library = torch.library.Library("meft_peers", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    library.impl("adamw", _adamw, "CPU")
    library.impl("add_gradient", _add_gradient, "CPU")
    torch.library.register_fake("meft_peers::adamw", lambda *_: None, lib=library)
    torch.library.register_fake("meft_peers::add_gradient", lambda sums, *_: sums.new_empty(()), lib=library)
    _kept.append(library)
    return torch.ops.meft_peers


_kept: list[torch.library.Library] = []  # its operations go with it


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat, size = [t.view(-1) for t in tensors], _PIECE * torch.get_num_threads()
    for start in range(0, flat[0].numel(), size):
        yield tuple(t[start : start + size] for t in flat)


def _adamw(
    master: Tensor, first: Tensor, second: Tensor, gradient: Tensor, out: Tensor, step: int, lr: float,
    betas: list[float], eps: float, weight_decay: float, factor: float,
) -> None:  # fmt: skip
    steps = torch.tensor(float(step))
    for weights, m, v, some, new in _pieces(master, first, second, gradient, out):
        scaled = some.float() if factor == 1 else some.float() * factor
        torch._fused_adamw_([weights], [scaled], [m], [v], [], [steps], lr=lr, beta1=betas[0], beta2=betas[1],
                            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)  # fmt: skip
        new.copy_(weights)


def _add_gradient(sums: Tensor, gradient: Tensor, overwrites: bool) -> Tensor:
    squares = torch.zeros((), dtype=torch.float64)
    for some, new in _pieces(sums, gradient):
        if overwrites:
            some.copy_(new)
        else:
            some.add_(new)
        squares += torch.linalg.vector_norm(some).double().square()
    return squares.float()
