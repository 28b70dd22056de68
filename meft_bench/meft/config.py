"""MeftOptions: every choice of MEFT, each a field with its kind, default and meaning. They are documented here (what is
computed) and in engine/config.py (how), and nowhere else.

Symbols, here and in all of meft_bench.meft; a tensor's name ends in its axes (keys_RD is [R, D]):

    B  batch                            K  neurons kept per token
    T  tokens, B x length               S  the union of kept neurons over the micro-batch
    D  hidden size                      U  |S|; also any list of rows
    L  layers                           H  halves of a row: 2, keys and values; 1, values alone, when keys are frozen
    R  neurons added per layer          X  width of any row: D, or 2 D
    N  experts, of m = R / N neurons    Q  candidates scored per token, P m
    P  experts probed per token         C  capacity, in rows kept on the device

A row is one neuron: its key and its value. A row is late when steps of the optimizer have not been made for it yet, and
still when no step without a gradient would change a bit of it. To settle is to make all late rows current.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from meft_bench.fields import Choice, Flag, Kind, Maybe, Real, Whole, check_names, shown
from meft_bench.flags import kinds, setting
from meft_bench.meft.engine.config import EngineConfig


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def default_experts(neurons: int) -> int:
    """The divisor of R nearest to 4 sqrt(R) (the smaller one on a tie); 368 for the paper's R = 8464."""
    return min(divisors(neurons), key=lambda n: (abs(n - 4 * math.sqrt(neurons)), n))


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one MEFT adapter computes: the fields of MeftOptions that are not the engine's."""

    neurons: int = setting(Whole(1), "R: key-value pairs added to every FFN.")
    kept: int = setting(Whole(1), "K: neurons kept per token.", 64)
    key_experts: bool = setting(
        Flag(),
        'Search only the neurons of the probed experts (section 4.2); False searches all R (the paper\'s "w/o KE").',
        True,
    )
    experts: int | None = setting(
        Maybe(Whole(1)),
        "N; None takes the divisor of R nearest to 4 sqrt(R). Unused without Key-Experts.",
        None,
    )
    probed: int | None = setting(
        Maybe(Whole(1)), "P: experts searched per token; None takes min(8, N). Unused without Key-Experts.", None
    )
    reading: str = setting(
        Choice(("per_token", "union")),
        '"per_token": a token uses its own K neurons (released code). "union": it uses all of S (Algorithm 1, Eq. 4).',
        "per_token",
    )
    gate: str = setting(
        Choice(("score", "none", "softmax")),
        'What multiplies a neuron\'s activation: its expert\'s router "score", "none", or the "softmax" of the scores.',
        "score",
    )
    selection: str = setting(
        Choice(("positive", "signed", "relu_first")),
        '"positive": signed top-K, rows that do not fire are dropped from S. "signed": they stay in S (released code). '
        '"relu_first": ReLU, then top-K, so zeros fill up S (the paper\'s order).',
        "positive",
    )
    activation: str = setting(Choice(("relu", "silu")), '"relu" (paper) or "silu".', "relu")
    frozen_keys: bool = setting(Flag(), "Train the values only (the released CPU path).", False)
    router_init: str = setting(
        Choice(("mean_key", "mean_key_x50", "normal")),
        'Router row of an expert: "mean_key" is the mean of its keys at the keys\' norm, "mean_key_x50" the mean times '
        '50 (released LLaMA scripts), "normal" is N(0, 0.02).',
        "mean_key",
    )
    key_std: float | None = setting(
        Maybe(Real(above=0)),
        "Standard deviation of the keys' init; None is 0.02 sqrt(4096 / D), i.e. the paper's 0.02 at LLaMA-7B's width "
        "and the same spread of key . hidden at any other.",
        None,
    )
    adam: str = setting(
        Choice(("dense", "lazy")),
        '"dense": the trajectory of AdamW over all rows. "lazy": rows outside S keep their state and do not move.',
        "dense",
    )
    distinctive: int | None = setting(
        Maybe(Whole(1)),
        "t: update only the t neurons of a layer that a micro-batch uses most distinctively, by TF-IDF against "
        "background text (arXiv 2510.15103; docs/engine.md); everything else keeps its bits. None updates all of S.",
        None,
    )
    distinctive_above: float | None = setting(
        Maybe(Real(least=0)), "Update the neurons whose TF-IDF score lies above this, instead of t of them.", None
    )


@dataclass(frozen=True, kw_only=True)
class MeftOptions(EngineConfig, Method):
    """What one MEFT adapter computes (Method) and how (EngineConfig), as one flat table of options; paper section 4,
    Algorithm 1; defaults are ours.

    Raises ValueError, with the nearest legal value, for sizes that do not fit together.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept > self.neurons:
            raise ValueError(f"kept K={self.kept} exceeds neurons R={self.neurons}: set kept to at most {self.neurons}")
        if self.activation == "silu" and self.selection != "signed":
            raise ValueError(
                "activation='silu' is not zero below zero, so no row may be dropped: set selection='signed'"
            )
        if self.distinctive is not None and self.distinctive_above is not None:
            raise ValueError("distinctive and distinctive_above both say which neurons are updated: give one")
        if self.key_experts:
            self._check_experts()
        elif self.gate != "none":
            # Without Key-Experts there is no router, so there is nothing to gate with.
            object.__setattr__(self, "gate", "none")

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
    def is_distinctive(self) -> bool:
        """Only some of S is updated (engine/distinctive.py)."""
        return self.distinctive is not None or self.distinctive_above is not None

    @property
    def engine(self) -> EngineConfig:
        """The engine's part alone."""
        return EngineConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineConfig)})

    def parameter_groups(self, hidden_size: int, layers: int) -> dict[str, int]:
        """Trainable parameters by name: keys R*D*L, values R*D*L, router N*D*L (closed formula)."""
        rows = self.neurons * hidden_size * layers
        groups = {"keys": 0 if self.frozen_keys else rows, "values": rows}
        if self.trains_router:
            assert self.experts is not None
            groups["router"] = self.experts * hidden_size * layers
        return groups

    def to_dict(self) -> dict[str, Any]:
        """All fields with defaults resolved; MeftOptions(**to_dict()) is the same configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MeftOptions":
        """Raises ValueError naming any field that does not exist or is missing."""
        check_names(fields, FIELDS, "MEFT option")
        if "neurons" not in fields:
            raise ValueError("a MEFT configuration needs neurons (R, key-value pairs per layer)")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "MeftOptions":
        """The named set of choices ("default", "released", "paper") with the given fields on top."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {shown(name)}; choose one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **fields})


FIELDS: dict[str, Kind] = kinds(MeftOptions)
"""The kind of every option, by name."""

PRESETS: dict[str, dict[str, Any]] = {
    # Ours.
    "default": {},
    # What produced the paper's accuracies: the released training scripts for LLaMA.
    "released": {"selection": "signed", "router_init": "mean_key_x50", "key_std": 0.02},
    # Algorithm 1 to the letter: the union is used, the router only selects, ReLU comes before top-K.
    "paper": {"reading": "union", "gate": "none", "selection": "relu_first", "router_init": "normal", "key_std": 0.02,
              "adam": "lazy"},
}  # fmt: skip
