"""MeftConfig: every choice that decides what MEFT computes, each a field with its default.

Symbols, here and in all of meft_bench.meft: B batch, T tokens (B x length), D hidden size, L layers, R neurons added
per layer, N experts, m = R / N neurons per expert, P experts probed per token, K neurons kept per token, S the union of
kept neurons over the micro-batch, U = |S|.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from meft_bench.fields import Choice, Flag, Kind, Maybe, Real, Whole, check_names, check_table, shown

_CHOICES = {
    "reading": ("per_token", "union"),
    "gate": ("score", "none", "softmax"),
    "selection": ("positive", "signed", "relu_first"),
    "activation": ("relu", "silu"),
    "router_init": ("mean_key", "mean_key_x50", "normal"),
    "adam": ("dense", "lazy"),
    "placement": ("host", "device"),
    "scoring": ("fp32", "bf16", "int8"),
    "retrieval": ("host", "device"),
    "wire": ("model", "bf16"),
    "moments": ("fp32", "bf16"),
}


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def default_experts(neurons: int) -> int:
    """The divisor of R nearest to 4 sqrt(R) (the smaller one on a tie); 368 for the paper's R = 8464."""
    return min(divisors(neurons), key=lambda n: (abs(n - 4 * math.sqrt(neurons)), n))


@dataclass(frozen=True, kw_only=True)
class MeftConfig:
    """What one MEFT adapter computes and where its rows live (paper section 4, Algorithm 1; defaults are ours).

    Raises ValueError, with the nearest legal value, for sizes that do not fit together.
    """

    neurons: int
    """R: key-value pairs added to every FFN."""
    kept: int = 64
    """K: neurons kept per token."""
    key_experts: bool = True
    """Search only the neurons of the probed experts (section 4.2); False searches all R (the paper's "w/o KE")."""
    experts: int | None = None
    """N; None takes the divisor of R nearest to 4 sqrt(R). Unused without Key-Experts."""
    probed: int | None = None
    """P: experts searched per token; None takes min(8, N). Unused without Key-Experts."""
    reading: str = "per_token"
    """"per_token": a token uses its own K neurons (released code). "union": it uses all of S (Algorithm 1, Eq. 4)."""
    gate: str = "score"
    """What multiplies a neuron's activation: its expert's router "score", "none", or the "softmax" of the scores."""
    selection: str = "positive"
    """"positive": signed top-K, rows that do not fire are dropped from S. "signed": they stay in S (released code).
    "relu_first": ReLU, then top-K, so zeros fill up S (the paper's order)."""
    activation: str = "relu"
    """"relu" (paper) or "silu"."""
    frozen_keys: bool = False
    """Train the values only (the released CPU path)."""
    router_init: str = "mean_key"
    """Router row of an expert: "mean_key" is the mean of its keys at the keys' norm, "mean_key_x50" the mean times 50
    (released LLaMA scripts), "normal" is N(0, 0.02)."""
    key_std: float | None = None
    """Standard deviation of the keys' init; None is 0.02 sqrt(4096 / D), i.e. the paper's 0.02 at LLaMA-7B's width and
    the same spread of key . hidden at any other."""
    adam: str = "dense"
    """"dense": the trajectory of AdamW over all rows. "lazy": rows outside S keep their state and do not move."""
    placement: str = "host"
    """"host": rows, gradients and moments in host memory. "device": all resident, for reference."""
    device_budget: int = 0
    """Bytes of device memory for rows that stay there, over all layers: within an accumulation window no row crosses
    twice, gradients add up beside the rows, and rows that no step changed survive it. 0 sends S in every micro-batch,
    as the paper does; enough for every row makes a resident adapter whose optimizer is on the host."""
    overlap: bool | None = None
    """Do the host's work in background threads, beside the device's and beside the next micro-batch; the same bits.
    None means on CUDA only: on a CPU both would share the cores."""
    lookahead: int = 0
    """Select a layer's neurons from the FFN input this many layers earlier (paper appendix A, pre-retrieval), so that
    the host works ahead. 0 is exact."""
    scoring: str = "fp32"
    """Keys that are scored: "fp32", or a "bf16" or "int8" (scaled per row) copy of them. Rows that move are exact."""
    retrieval: str = "host"
    """"device" scores all R keys, as int8, on the device: no hidden states cross and no Key-Experts are needed."""
    wire: str = "model"
    """Number format of rows and gradients that cross: the "model"'s own, or "bf16"."""
    moments: str = "fp32"
    """Adam's moments: "fp32" or "bf16" (with stochastic rounding)."""

    def __post_init__(self) -> None:
        check_table(FIELDS, self)
        if self.kept > self.neurons:
            raise ValueError(f"kept K={self.kept} exceeds neurons R={self.neurons}: set kept to at most {self.neurons}")
        if self.activation == "silu" and self.selection != "signed":
            raise ValueError(
                "activation='silu' is not zero below zero, so no row may be dropped: set selection='signed'"
            )
        self._check_engine()
        if self.key_experts:
            self._check_experts()
        elif self.gate != "none":
            # Without Key-Experts there is no router, so there is nothing to gate with.
            object.__setattr__(self, "gate", "none")

    def _check_engine(self) -> None:
        if self.placement == "device":
            for name in ("device_budget", "lookahead"):
                if getattr(self, name):
                    raise ValueError(f"placement='device' keeps every row on the device: leave {name} at 0")
        if self.retrieval == "device":
            if self.key_experts:
                raise ValueError("retrieval='device' scores all keys, no experts: set key_experts=False")
            if self.placement == "device" or self.lookahead or self.scoring != "fp32":
                raise ValueError(
                    "retrieval='device' is for rows on the host, scores int8 keys and does not wait: leave placement "
                    "at 'host', lookahead at 0 and scoring at 'fp32'"
                )

    def _check_experts(self) -> None:
        neurons = self.neurons
        if self.experts is None:
            object.__setattr__(self, "experts", default_experts(neurons))
        experts = self.experts
        assert experts is not None
        if experts > neurons:
            raise ValueError(f"experts N={experts} exceeds neurons R={neurons}: set experts to at most {neurons}")
        if neurons % experts:
            nearest = max(1, round(neurons / experts)) * experts
            fitting = min(divisors(neurons), key=lambda n: abs(n - experts))
            raise ValueError(
                f"experts N={experts} does not divide neurons R={neurons}: the nearest legal R is {nearest} "
                f"(or keep R and set experts={fitting})"
            )
        if self.probed is None:
            object.__setattr__(self, "probed", min(8, experts))
        assert self.probed is not None
        if self.probed > experts:
            raise ValueError(f"probed P={self.probed} exceeds experts N={experts}: set probed to at most {experts}")
        if self.kept > self.candidates:
            raise ValueError(
                f"kept K={self.kept} exceeds the {self.candidates} candidates of P={self.probed} experts with "
                f"m={self.expert_size} neurons each: lower kept to {self.candidates} or raise probed"
            )

    @property
    def expert_size(self) -> int:
        """m = R / N (R without Key-Experts)."""
        return self.neurons // self.experts if self.key_experts and self.experts else self.neurons

    @property
    def candidates(self) -> int:
        """Neurons scored per token: P x m with Key-Experts, R without."""
        return self.probed * self.expert_size if self.key_experts and self.probed else self.neurons

    @property
    def trains_router(self) -> bool:
        """The router has a gradient exactly when its score multiplies the activation."""
        return self.key_experts and self.gate != "none"

    @property
    def router_on_device(self) -> bool:
        """Whether gates and the router's gradient are made on the device, from a copy of the router sent once per
        step: where rows stay there too, and where the host selects from another layer's hidden states."""
        return self.trains_router and self.placement == "host" and bool(self.device_budget or self.lookahead)

    def parameter_groups(self, hidden_size: int, layers: int) -> dict[str, int]:
        """Trainable parameters by name: keys R*D*L, values R*D*L, router N*D*L (closed formula)."""
        rows = self.neurons * hidden_size * layers
        groups = {"keys": 0 if self.frozen_keys else rows, "values": rows}
        if self.trains_router:
            assert self.experts is not None
            groups["router"] = self.experts * hidden_size * layers
        return groups

    def to_dict(self) -> dict[str, Any]:
        """All fields with defaults resolved; MeftConfig(**to_dict()) is the same configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MeftConfig":
        """Raises ValueError naming any field that does not exist or is missing."""
        check_names(fields, FIELDS, "MEFT option")
        if "neurons" not in fields:
            raise ValueError("a MEFT configuration needs neurons (R, key-value pairs per layer)")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "MeftConfig":
        """The named set of choices ("default", "released", "paper") with the given fields on top."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {shown(name)}; choose one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **fields})


_SIZE = Maybe(Whole(1))
FIELDS: dict[str, Kind] = {
    **{name: Choice(allowed) for name, allowed in _CHOICES.items()},
    "neurons": Whole(1),
    "kept": Whole(1),
    "experts": _SIZE,
    "probed": _SIZE,
    "key_experts": Flag(),
    "frozen_keys": Flag(),
    "device_budget": Whole(0, 2**62),
    "lookahead": Whole(0),
    "overlap": Maybe(Flag()),
    "key_std": Maybe(Real(above=0)),
}
"""The door's table of the fields above."""

PRESETS: dict[str, dict[str, Any]] = {
    # Ours.
    "default": {},
    # What produced the paper's accuracies: the released training scripts for LLaMA.
    "released": {"selection": "signed", "router_init": "mean_key_x50", "key_std": 0.02},
    # Algorithm 1 to the letter: the union is used, the router only selects, ReLU comes before top-K.
    "paper": {"reading": "union", "gate": "none", "selection": "relu_first", "router_init": "normal", "key_std": 0.02,
              "adam": "lazy"},
}  # fmt: skip
