"""Bytes of a training step by formula, on the device and in host memory; nothing is measured and torch is not imported.

The one place where such bytes are predicted: plans, estimates and refusals ask here. Upper bounds where the truth
depends on the rows (a token can use K neurons at most, so U is min(R, T K) unless the caller says what it assumes).
tests/profile/test_step_bytes.py compares them with simulated steps.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.meft.config import MeftOptions
from meft_bench.train.contract import MethodInfo

if TYPE_CHECKING:
    from meft_bench.train.methods import ModelShape

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by dtype."""
ACTIVATION_BYTES = 34
"""Per token, layer and hidden unit kept for backward at 16 bits (Korthikanti et al. 2022, without attention scores)."""
CONTEXT_BYTES = 600_000_000
"""CUDA context and library workspaces, a usual figure."""
STATE_BYTES, LEAST_STATE_BYTES = 16, 12
"""Of a trained parameter of an adapter: fp32 value, gradient and two moments; the least has moments of 16 bits."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Purpose to predicted bytes at the peak of a training step."""

    device: dict[str, int]
    host: dict[str, int]
    """Empty where everything lies on the device."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is to be predicted: a base, and one micro-batch on it."""

    shape: "ModelShape"
    tokens: int
    """T of a micro-batch, padding included."""
    dtype: str
    vocabulary: int = 0
    """Words; 0 where it is not known, and then logits are left out."""
    cuda: bool = False
    union_share: float | None = None
    """U / R assumed for methods that move the rows in use; None takes the upper bound."""
    ranks: bool = False
    """Several processes train together."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""

    @property
    def width(self) -> int:
        """Bytes of a number of the base, and of one that crosses to the device."""
        return WIDTH[self.dtype]

    @property
    def tables(self) -> tuple[int, ...]:
        """Rows of the embedding and, where they are not one, of the output layer: what a LLaMA-like model has beyond
        its layers. One table where the vocabulary is not known."""
        d = self.shape.hidden
        layers = self.shape.layers * (sum(m * n for m, n in self.shape.matrices) + 2 * d) + d
        rows = max(0, self.shape.parameters - layers) // d
        words = self.vocabulary or rows
        return (words,) * round(rows / words) if words else ()


def step_bytes(method: MethodInfo, options: Any, trainable: int, step: Step) -> Bytes:
    """Bytes of a step as the method's own optimizer keeps its state: AdamW, or what its state_bytes says. options: the
    method's Options."""
    device = _base_bytes(step)
    if method.untrained:
        return Bytes(device=device, host={})
    if method.own_state:
        from meft_bench.train.methods import find_method

        own = find_method(method.name).state_bytes(options, step)
        return Bytes(device={**device, **own.device}, host=own.host)
    # A trained base is its own adapter, in its own dtype; an adapter's state is fp32.
    width = step.width if method.trains_base else _FP32
    state = {"gradients": width * trainable, "Adam moments": 2 * width * trainable}
    if method.trains_base:
        return Bytes(device={**device, **state}, host={})
    adapter = {"adapter": _FP32 * trainable}
    if not method.on_host(vars(options)):
        return Bytes(device={**device, **adapter, **state}, host={})
    return _on_host(method, options, step, device, {**adapter, **state})


def activation_bytes(tokens: int, hidden: int, layers: int, dtype: str = "bfloat16") -> int:
    """What backward needs of a micro-batch's forward pass."""
    return tokens * layers * hidden * ACTIVATION_BYTES * WIDTH[dtype] // 2


def _base_bytes(step: Step) -> dict[str, int]:
    shape = step.shape
    held = {
        "base weights": shape.parameters * step.width,
        "activations": activation_bytes(step.tokens, shape.hidden, shape.layers, step.dtype),
        # In the model's dtype, then in fp32 with their softmax and gradient.
        "logits": step.tokens * step.vocabulary * (step.width + 3 * _FP32),
    }
    return {**held, "CUDA context": CONTEXT_BYTES} if step.cuda else held


def _on_host(method: MethodInfo, options: Any, step: Step, device: dict[str, int], state: dict[str, int]) -> Bytes:
    """A method whose state lies in host memory: the rows in use cross, and what is kept on the device is counted."""
    union = _union(method, options, step)
    if isinstance(options, MeftOptions):
        if options.moments == "bf16":
            state["Adam moments"] //= 2
        device |= _rows(options, union, step)
    else:
        device["adapter rows"] = _passing(union, step)
    return Bytes(device=device, host=state)


def _passing(rows: float, step: Step) -> int:
    """Rows of every layer stay on the device until backward; gradients leave layer by layer."""
    return int(2 * rows * step.shape.hidden * (step.shape.layers + 1) * step.width)


def _rows(options: MeftOptions, union: float, step: Step) -> dict[str, int]:
    """What device_budget keeps on the device between micro-batches (engine/budget.py), and the rows that pass by."""
    if not options.device_budget and options.retrieval != "device":
        return {"adapter rows": _passing(union, step)}
    import torch  # here: bytes of other methods are told without it

    from meft_bench.meft.engine.budget import split

    dtype = getattr(torch, step.dtype)
    shape = step.shape
    bought = split(options, shape.layers, shape.hidden, dtype, router_there=step.cuda, host_optimizer=step.ranks)
    if not bought.rows:
        return {"adapter rows": _passing(union, step), "kept on the device": bought.nbytes}
    # Held rows are those used most, and so at least as many of the union's as of all.
    others = union * (1 - bought.rows / options.neurons) if bought.moments else max(0.0, union - bought.rows)
    # Others stay until backward; a layer at work puts its union together, and makes the rows' gradients.
    passing = int((2 * others * shape.layers + 4 * union) * shape.hidden * step.width)
    return {"adapter rows": passing, "kept on the device": bought.nbytes}


def _union(method: MethodInfo, options: Any, step: Step) -> float:
    """Rows a layer moves for one micro-batch; all of them where the method does not choose."""
    assert method.size is not None
    neurons, kept = getattr(options, method.size), getattr(options, "kept", None)
    if kept is None:
        return neurons
    return step.union_share * neurons if step.union_share is not None else min(neurons, step.tokens * kept)
