"""One training step of each variant of the paper's Figure 5, timed by its parts.

What runs is the code that trains: the parts are what the loop and the engine announce (observe.py). B batch, T = B x
length tokens, D hidden size, R neurons per layer, N experts, P probed, K kept per token, U rows moved per layer.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meft_bench import observe
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.routing import Selection
from meft_bench.meft.sites import ADAPTER_NAME, decoder_layers
from meft_bench.train.loop import one_step
from meft_bench.train.methods import find_method, require_choice, require_positive

COMPONENTS = ("retrieval", "gather", "transfer", "device", "gradients", "adam")
BASELINE = "parallel_adapter"
LR = 1e-3


class Variant(NamedTuple):
    """One bar of Figure 5."""

    name: str
    title: str
    key_experts: bool
    sparse: bool
    """Only the rows of the union cross the link; False moves all R of them."""


VARIANTS = (
    Variant(BASELINE, "Parallel Adapter, resident", False, False),
    Variant("meft", "MEFT", True, True),
    Variant("meft_no_ke", "MEFT without Key-Experts", False, True),
    Variant("meft_no_sparse", "MEFT without sparse transfer", True, False),
    Variant("meft_neither", "MEFT without both", False, False),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What one step computes. Raises ValueError for values that do not fit together."""

    batch: int = 2
    length: int = 256
    """Tokens per sequence."""
    hidden: int = 256
    layers: int = 2
    ffn: int = 688
    heads: int = 4
    vocabulary: int = 64
    """Tokens are drawn evenly from it. 64 repeats them about as often as makes U/R fall where the paper's traffic puts
    it (26 to 52 %); with a large one every token is its own and U is close to R."""
    neurons: int = 4096
    """R per layer."""
    kept: int = 64
    """K."""
    experts: int | None = None
    """N; None takes MeftOptions's default."""
    probed: int | None = None
    """P; None takes MeftOptions's default, 8."""
    warmup: int = 2
    """Untimed steps per variant."""
    device: str = "cpu"
    """Where model and data live: "cpu" or "cuda"."""
    dtype: str = "float32"
    """Of the base model and of the rows that cross: "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        optional = ("experts", "probed", "device", "dtype")
        require_positive(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in optional})
        require_choice("device", self.device, ("cpu", "cuda"))
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} must be a multiple of 2 x heads = {2 * self.heads}")
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: the loss is on the next token")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device: use device='cpu'")
        self.config(key_experts=True)

    def config(self, key_experts: bool) -> MeftOptions:
        experts, probed = (self.experts, self.probed) if key_experts else (None, None)
        return MeftOptions(
            neurons=self.neurons, kept=self.kept, key_experts=key_experts, experts=experts, probed=probed,
            overlap=False,  # spans must not lie beside one another, as they would on a GPU
        )  # fmt: skip


class Span(NamedTuple):
    """One timed call; seconds of time.perf_counter."""

    component: str
    lane: str
    name: str
    start_s: float
    end_s: float


class Mark(NamedTuple):
    """From start_s on, the step is in this phase, decoder layer (-1: none) and part of the model."""

    start_s: float
    phase: str
    layer: int
    part: str


@dataclass
class Step:
    """What one step recorded; spans neither overlap nor cross a mark."""

    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    end_s: float = 0.0
    rows_moved: list[int] = field(default_factory=list)
    """U per layer; empty for a resident adapter."""
    h2d_bytes: int = 0
    d2h_bytes: int = 0

    @property
    def total_s(self) -> float:
        return self.end_s - self.marks[0].start_s

    def components_s(self) -> dict[str, float]:
        """Seconds by component; "device" is all that no span covers, so they add up to the total."""
        parts = {name: sum(s.end_s - s.start_s for s in self.spans if s.component == name) for name in COMPONENTS}
        parts["device"] = self.total_s - sum(parts.values())
        return parts


class Clock:
    """A listener that writes spans and marks into a Step. On CUDA every reading first waits for the device: nothing
    overlaps. What is announced within a span of the same thread is part of it."""

    def __init__(self, device: str) -> None:
        self.cuda, self.phase, self.step = device == "cuda", "forward", Step()
        self._here = threading.local()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, layer: int, part: str) -> None:
        self.step.marks.append(Mark(self.now(), self.phase, layer, part))

    @contextmanager
    def during(self, work: observe.Work) -> Iterator[None]:
        if work.kind == "phase":
            self.phase = work.name
            self.mark(-1, "model")
            yield
        elif work.kind not in ("part", "copy") or getattr(self._here, "within", False):
            yield
        else:
            self._here.within, start_s = True, self.now()
            try:
                yield
            finally:
                self._here.within = False
                self.step.spans.append(Span(*_place(work), start_s, self.now()))


def _place(work: observe.Work) -> tuple[str, str, str]:
    """(component, lane, name) of an announced part or copy."""
    if work.kind == "copy":
        return "transfer", "link", f"{work.name} {work.direction}"
    return work.name, "host", "select" if work.name == "retrieval" else work.doing or work.name


class Trainer:
    """A random Llama with one variant's adapters, its optimizer, and the clock around them."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        self.variant, self.clock = variant, Clock(sizes.device)
        self.model = random_llama(sizes)
        if variant.name == BASELINE:
            baseline = find_method(BASELINE)
            self.attached = baseline.attach(self.model, baseline.Options(neurons=sizes.neurons), 0)
        else:
            self.attached = find_method("meft").attach(self.model, sizes.config(variant.key_experts), 0)
        self.optimizer = self.attached.make_optimizer(lr=LR, weight_decay=0.0)
        self.adapters = [getattr(layer, ADAPTER_NAME) for layer in decoder_layers(self.model)]
        if variant.name != BASELINE and not variant.sparse:
            for adapter in self.adapters:
                move_all_rows(adapter)
        self.model.train()
        self._mark_layers()

    def step(self, ids_BL: Tensor) -> Step:
        """Forward, backward, update on ids [B, length], timed."""
        clock, link = self.clock, self.attached.link
        clock.step = step = Step()
        if link is not None:
            link.reset()
        with observe.listening(clock):
            one_step(self.optimizer, [functools.partial(self._loss, ids_BL)])
            step.end_s = clock.now()
        if link is not None:
            step.rows_moved = [usage[-1][1] for usage in self.attached.usage]
            step.h2d_bytes = sum(n for (direction, _), n in link.bytes.items() if direction == "h2d")
            step.d2h_bytes = sum(n for (direction, _), n in link.bytes.items() if direction == "d2h")
        return step

    def _loss(self, ids_BL: Tensor) -> Tensor:
        mask_BL = torch.ones_like(ids_BL)
        return self.model(input_ids=ids_BL, attention_mask=mask_BL, labels=ids_BL, use_cache=False).loss

    def _mark_layers(self) -> None:
        """Marks at entry and exit of decoder layers and adapters. In backward, the gradient of an output arrives
        just before its module's turn; the adapter's turn comes before that of the FFN beside it."""
        clock = self.clock
        for i, (layer, adapter) in enumerate(zip(decoder_layers(self.model), self.adapters, strict=True)):
            for module, part, outside in ((layer, "layer", -1), (adapter, "adapter", i)):

                def enter(*_: Any, i: int = i, part: str = part) -> None:
                    clock.mark(i, part)

                def leave(module: Any, args: Any, out: Tensor, outside: int = outside, enter: Callable = enter) -> None:
                    clock.mark(outside, "model" if outside < 0 else "layer")
                    out.register_hook(lambda grad: enter())

                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
            if self.attached.link is not None:  # one autograd node: what follows it is the rest of its layer
                adapter.register_forward_hook(functools.partial(self._leave_in_backward, i))

    def _leave_in_backward(self, i: int, module: Any, args: Any, out: Tensor) -> None:
        assert out.grad_fn is not None
        out.grad_fn.register_hook(lambda *_: self.clock.mark(i, "layer"))


def move_all_rows(adapter: MeftAdapter) -> None:
    """Make this adapter move all R rows and all their gradients whatever the tokens kept.

    It computes the same function: bit for bit while products.py takes its sparse path for both (CPU, U > 8 K), else up
    to the order of sums.
    """
    neurons = adapter.config.neurons

    def whole(h_TD: Tensor, chosen: Selection) -> Selection:
        # Place -1, the empty one, reads the last entry: -1 again.
        numbers = torch.cat([chosen.union_U, chosen.union_U.new_tensor([-1])])
        all_R = torch.arange(neurons, device=chosen.union_U.device)
        return dataclasses.replace(chosen, union_U=all_R, local_TK=numbers[chosen.local_TK])

    adapter.on_select = whole


def random_llama(sizes: Sizes) -> nn.Module:
    """The same weights for every variant."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(device=sizes.device, dtype=getattr(torch, sizes.dtype))
