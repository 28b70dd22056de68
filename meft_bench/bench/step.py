"""One training step of each variant of the paper's Figure 5, split into its parts, and one step's events (Figure 9).

What runs is the code that trains: the parts are timed by wrapping methods on instances. B batch, T = B x length tokens,
D hidden size, R neurons per layer, N experts, P probed, K kept per token, U rows moved per layer.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from meft_bench.bench.common import open_folder
from meft_bench.harness.record import write_json
from meft_bench.meft.config import MeftConfig
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.routing import Selection
from meft_bench.meft.sites import ADAPTER_NAME, decoder_layers
from meft_bench.provenance import cpu_model, provenance
from meft_bench.train.methods import find_method, require_choice, require_positive
from meft_bench.write import write_if_changed

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
    """N; None takes MeftConfig's default."""
    probed: int | None = None
    """P; None takes MeftConfig's default, 8."""
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

    def config(self, key_experts: bool) -> MeftConfig:
        experts, probed = (self.experts, self.probed) if key_experts else (None, None)
        return MeftConfig(neurons=self.neurons, kept=self.kept, key_experts=key_experts, experts=experts, probed=probed)


def timeline_benchmark(output: Path, repeats: int = 7, **sizes: Any) -> str:
    """Time the variants' steps in turn; write timeline.json and timeline.md into output, return the Markdown.

    sizes are fields of Sizes. Each repeat runs every variant once on the same fresh tokens, so a drifting machine moves
    all of them; a ratio compares two steps of one repeat. Times are seconds of wall clock; within a repeat the six
    components add up to the total, their medians need not. Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats)
    known = {f.name for f in dataclasses.fields(Sizes)}
    if unknown := sorted(set(sizes) - known):
        raise ValueError(f"timeline has no size {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    settings = Sizes(**sizes)
    open_folder(output)
    trainers = [Trainer(variant, settings) for variant in VARIANTS]
    generator = torch.Generator().manual_seed(0)
    steps: dict[str, list[Step]] = {variant.name: [] for variant in VARIANTS}
    for repeat in tqdm(range(settings.warmup + repeats), desc="timeline", unit="round", leave=False):
        ids_BL = torch.randint(settings.vocabulary, (settings.batch, settings.length), generator=generator)
        for trainer in trainers:
            step = trainer.step(ids_BL.to(settings.device))
            if repeat >= settings.warmup:
                steps[trainer.variant.name].append(step)
    # The step of Figure 9 is a timed one: the one whose total is the median.
    typical = sorted(steps["meft"], key=lambda s: s.total_s)[(repeats - 1) // 2]
    threads, config = torch.get_num_threads(), settings.config(key_experts=True)
    result = {
        "evidence": "measured",
        "about": _about(settings),
        "settings": {**dataclasses.asdict(settings), "experts": config.experts, "probed": config.probed,
                     "repeats": repeats, "threads": threads, "learning_rate": LR},
        "variants": [_summary(v, steps[v.name], steps[BASELINE]) for v in VARIANTS],
        "events": events(typical),
        "provenance": provenance(threads),
    }  # fmt: skip
    write_json(output / "timeline.json", result)
    text = _markdown(result)
    write_if_changed(output / "timeline.md", text.encode())
    return text


# ---- one step ----


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


class _Clock:
    """Writes spans and marks into a Step. On CUDA every reading first waits for the device: nothing overlaps."""

    def __init__(self, device: str) -> None:
        self.cuda, self.phase, self.step = device == "cuda", "forward", Step()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, layer: int, part: str) -> None:
        self.step.marks.append(Mark(self.now(), self.phase, layer, part))

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.mark(-1, "model")

    def wrap(self, target: Any, method: str, component: str, lane: str, name: str | None = None) -> None:
        """Replace target.method, on this instance only, by one that records a span; a copy without a name is named by
        its purpose and direction."""
        inner: Callable = getattr(target, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = self.now()
            result = inner(*args, **kwargs)
            label = name or "{1} {0}".format(*args[2])
            self.step.spans.append(Span(component, lane, label, start_s, self.now()))
            return result

        setattr(target, method, timed)


class Trainer:
    """A random Llama with one variant's adapters, its optimizer, and the clock around them."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        self.variant, self.clock = variant, _Clock(sizes.device)
        self.model = _random_llama(sizes)
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
        self._wrap_calls()
        self._mark_layers()

    def step(self, ids_BL: Tensor) -> Step:
        """Forward, backward, update on ids [B, length], timed."""
        clock, link = self.clock, self.attached.link
        clock.step = step = Step()
        if link is not None:
            link.reset()
        clock.enter("forward")
        loss = self.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), labels=ids_BL, use_cache=False).loss
        clock.enter("backward")
        loss.backward()
        clock.enter("update")
        self.optimizer.step()
        self.optimizer.zero_grad()
        step.end_s = clock.now()
        if link is not None:
            step.rows_moved = [usage[-1][1] for usage in self.attached.usage]
            step.h2d_bytes = sum(n for (direction, _), n in link.bytes.items() if direction == "h2d")
            step.d2h_bytes = sum(n for (direction, _), n in link.bytes.items() if direction == "d2h")
        return step

    def _wrap_calls(self) -> None:
        clock = self.clock
        clock.wrap(self.optimizer, "step", "adam", "host", "adam")
        clock.wrap(self.optimizer, "zero_grad", "adam", "host", "zero_grad")
        if self.attached.link is not None:
            clock.wrap(self.attached.link, "_copy", "transfer", "link")
            for adapter in self.adapters:
                clock.wrap(adapter, "select", "retrieval", "host", "select")
                clock.wrap(adapter.store, "gather", "gather", "host", "gather")
                clock.wrap(adapter.store, "add_router_gradient", "gradients", "host", "add_router_gradient")
                clock.wrap(adapter.store, "add_gradients", "gradients", "host", "add_gradients")

    def _mark_layers(self) -> None:
        """Marks at the doors of decoder layers and adapters, both ways. In backward, the gradient of an output arrives
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
    inner, neurons = adapter.select, adapter.config.neurons

    def select(host_h_TD: Tensor, valid_T: Tensor | None) -> Selection:
        chosen = inner(host_h_TD, valid_T)
        # Place -1, the empty one, reads the last entry: -1 again.
        numbers = torch.cat([chosen.union_U, chosen.union_U.new_tensor([-1])])
        all_R = torch.arange(neurons, device=chosen.union_U.device)
        return dataclasses.replace(chosen, union_U=all_R, local_TK=numbers[chosen.local_TK])

    adapter.select = select  # type: ignore[method-assign]


def _random_llama(sizes: Sizes) -> nn.Module:
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


# ---- what is written ----


def events(step: Step) -> list[dict[str, Any]]:
    """The step as events that follow one another without gap: spans on their lanes, all between them on "device".

    start_s and end_s are seconds since the step's start.
    """
    found, origin = [], step.marks[0].start_s

    def add(lane: str, name: str, mark: Mark, start_s: float, end_s: float) -> None:
        start, end = round(start_s - origin, 6), round(end_s - origin, 6)
        if end > start:
            found.append({"lane": lane, "name": name, "layer": mark.layer, "phase": mark.phase,
                          "start_s": start, "end_s": end})  # fmt: skip

    ends = [m.start_s for m in step.marks[1:]] + [step.end_s]
    for mark, end_s in zip(step.marks, ends, strict=True):
        at = mark.start_s
        for span in (s for s in step.spans if mark.start_s <= s.start_s < end_s):
            add("device", mark.part, mark, at, span.start_s)
            add(span.lane, span.name, mark, span.start_s, span.end_s)
            at = span.end_s
        add("device", mark.part, mark, at, end_s)
    return found


def _summary(variant: Variant, steps: list[Step], baseline: list[Step]) -> dict[str, Any]:
    totals = [s.total_s for s in steps]
    parts = [s.components_s() for s in steps]
    return {
        "name": variant.name,
        "title": variant.title,
        "median_s": {name: round(statistics.median(p[name] for p in parts), 6) for name in COMPONENTS},
        "components_s": {name: [round(p[name], 6) for p in parts] for name in COMPONENTS},
        "total_s": round(statistics.median(totals), 6),
        "total_low_s": round(min(totals), 6),
        "total_high_s": round(max(totals), 6),
        "totals_s": [round(t, 6) for t in totals],
        "ratio_to_parallel_adapter": [round(s.total_s / b.total_s, 4) for s, b in zip(steps, baseline, strict=True)],
        "rows_moved_by_layer": [s.rows_moved for s in steps],
        "h2d_bytes": [s.h2d_bytes for s in steps],
        "d2h_bytes": [s.d2h_bytes for s in steps],
    }


def _about(sizes: Sizes) -> str:
    rest = (
        '"device" is all of forward and backward that is not in another component: the model, the adapters, and the '
        "casts and the router's gradient product that the host makes. All-rows variants gather through the same "
        "index_select as the others. A random-weight Llama on random tokens: rows_moved_by_layer says how sparse."
    )
    if sizes.device == "cuda":
        return (
            f"One GPU ({torch.cuda.get_device_name()}) and its host ({cpu_model()}): copies are from pageable memory, "
            f"and each span waits for the device, so nothing overlaps. {rest}"
        )
    return (
        f"CPU only ({cpu_model()}): the device is an arena in the same host memory, so transfers are memory copies, "
        f"not PCIe. {rest}"
    )


def _markdown(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"One training step, B x length = {s['batch']} x {s['length']}, D={s['hidden']}, {s['layers']} layers, "
        f"R={s['neurons']}, N={s['experts']}, P={s['probed']}, K={s['kept']}, {s['dtype']}, {s['threads']} threads; "
        f"milliseconds, medians of {s['repeats']} repeats, the total with its lowest and highest (measured).",
        "",
        result["about"],
        "",
        f"| variant | rows moved, % of R | {' | '.join(COMPONENTS)} | total | times the Parallel Adapter's |",
        "|---|---:|" + "---:|" * (len(COMPONENTS) + 2),
    ]
    for v in result["variants"]:
        rows = [u for step in v["rows_moved_by_layer"] for u in step]
        share = f"{100 * statistics.mean(rows) / s['neurons']:.0f}" if rows else "–"
        parts = " | ".join(f"{1000 * v['median_s'][name]:.1f}" for name in COMPONENTS)
        total = f"{1000 * v['total_s']:.1f} ({1000 * v['total_low_s']:.1f}–{1000 * v['total_high_s']:.1f})"
        ratio = statistics.median(v["ratio_to_parallel_adapter"])
        lines.append(f"| {v['title']} | {share} | {parts} | {total} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"
