"""The rows of a GPU session as data, in order of worth: a session that ends early has measured the most useful ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.profile.measured import counted_by_run
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.variants import KNOWN

ALL_TOKENS = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the session."""

    variant: str
    neurons: int = 3072
    batch: int = 2
    seq: int = 256
    accumulations: tuple[int, ...] = (1, 8)
    """Micro-batches a step; always with 1."""
    whole: bool = False
    """With seconds by part and Kineto's trace, taken at the session's end, which take as long again."""
    tokens: int = ALL_TOKENS
    """Tokens that batches are drawn from; with few of them U is small. ALL_TOKENS is the whole vocabulary."""

    @property
    def name(self) -> str:
        """ "meft R=3072 2x256"; what predictions are filed under."""
        few = f" of {self.tokens} tokens" if self.tokens else ""
        return f"{self.variant} R={self.neurons} {self.batch}x{self.seq}{few}"

    @property
    def place(self) -> tuple[int, int, int]:
        """What rows of one file share."""
        return self.batch, self.seq, self.tokens

    def spec(self, model: str, union: Union | None = None) -> ProfileSpec:
        """As the profile measures it; union replaces the U that the run counts itself."""
        counted = union or counted_by_run(self.neurons)
        return ProfileSpec(
            model=model,
            variant=self.variant,
            neurons=self.neurons,
            batch=self.batch,
            seq=self.seq,
            union=counted if KNOWN[self.variant].needs_union else None,
        )


def _long(variant: str, neurons: int = 3072) -> Row:
    """4096 tokens at once: what a card of this class needs to be bound by its own work."""
    return Row(variant=variant, neurons=neurons, batch=8, seq=512, accumulations=(1,))


ROWS = (
    Row(variant="parallel_adapter", whole=True),
    Row(variant="meft", whole=True),
    *(_long(v) for v in ("parallel_adapter", "meft", "meft_budget_100", "meft_budget_50", "meft_fast")),
    Row(variant="meft_keys_on_device"),
    *(Row(variant=v) for v in ("meft_budget_100", "meft_budget_50", "meft_fast", "meft_budget_25")),
    Row(variant="parallel_adapter_host_optimizer_gradients"),
    Row(variant="parallel_adapter_torchao"),
    Row(variant="parallel_adapter_cpu_adam"),
    Row(variant="parallel_adapter_adam8bit"),
    Row(variant="meft_no_ke_on_device"),
    Row(variant="meft_lazy"),
    Row(variant="meft_serial", accumulations=(1,)),
    Row(variant="meft", tokens=16),
    *(Row(variant=v, neurons=6144) for v in ("parallel_adapter", "meft", "meft_budget_50")),
    *(_long(v, 6144) for v in ("parallel_adapter", "meft", "meft_budget_50")),
)


@dataclass(frozen=True, kw_only=True)
class List:
    """Rows on one base, and how often each is timed."""

    model: str
    config: Any
    rows: Sequence[Row]
    steps: int = 5
    later_steps: int = 2
    """With more than one micro-batch."""
    warmup: int = 2


def at_7b() -> List:
    """The session's own list."""
    from meft_bench.profile.shapes import model_config

    return List(model="llama-7b", config=model_config("llama-7b"), rows=ROWS)


def tiny() -> List:
    """The same rows on a model of two narrow layers, to try the command where there is no GPU."""
    from dataclasses import replace

    from transformers import LlamaConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    rows: list[Row] = []
    for row in ROWS:
        batch, seq = (2, 16) if row.seq == 256 else (2, 32)
        few = tuple(sorted({min(a, 2) for a in row.accumulations}))
        small = replace(row, neurons=row.neurons // 24, batch=batch, seq=seq, accumulations=few)
        rows.append(small)
    return List(model="tiny", config=config, rows=rows, steps=1, later_steps=1, warmup=1)
