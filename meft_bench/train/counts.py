"""Trainable parameters of a method on a base, counted by attaching it to that base without weights.

A closed formula knows LLaMA's seven matrices; GPT-2 fuses three of them, OPT has no gate, Gemma's heads are wider than
its hidden size. What attaches says itself what it trains.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meft_bench.meft.sites import hidden_size, parallel_ffns
from meft_bench.named import EMBEDDED
from meft_bench.train.contract import describe
from meft_bench.train.methods import ModelShape, find_method
from meft_bench.train.models import embedded_dir, shape_of


def empty_model(config: Any) -> Any:
    """The causal language model of a config on the meta device: modules and shapes, tied where they are tied, no
    weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


class Counted:
    """Counts on one base, given by its config; each method is attached at most twice per set of other options."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.known: dict[tuple[str, Any], dict[str, int]] = {}
        self._sites: ModelShape | None = None

    @classmethod
    def of(cls, source: str | Path, revision: str | None = None) -> "Counted":
        """Of "embedded", a folder or a hub id; its config alone is read. Raises ValueError with one line."""
        path = embedded_dir() if source == EMBEDDED else source
        try:
            return cls(AutoConfig.from_pretrained(path, trust_remote_code=False, revision=revision or "main"))
        except Exception as error:  # transformers and the hub raise many kinds; the user needs one line
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the config of {source}: {first}") from None

    def groups(self, method: str, options: Any) -> dict[str, int]:
        """Trainable parameters by group, as Attached.parameter_groups() gives them. options: the method's Options.

        Raises ValueError where the method does not attach to this base.
        """
        about, size = describe(method), describe(method).size
        if about.exact_count:
            return find_method(method).count(options, self.ffns)
        if not about.kinds or about.trains_base:  # what a base trains of itself is there: no size makes it larger
            return self._attached(method, options)
        if size is None:  # what makes it larger is not known, so it may not fit into memory here
            return find_method(method).count(options, shape_of(empty_model(self.config)))
        # Parameters are affine in the size: two small ones give every other.
        one, two = (self._attached(method, dataclasses.replace(options, **{size: n})) for n in (1, 2))
        steps = getattr(options, size) - 1
        return {group: count + (two[group] - count) * steps for group, count in one.items()}

    def trainable(self, method: str, options: Any) -> int:
        """Sum of groups()."""
        return sum(self.groups(method, options).values())

    def _attached(self, method: str, options: Any) -> dict[str, int]:
        if (method, options) not in self.known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names it will change
                attached = find_method(method).attach(empty_model(self.config), options, 0)
            self.known[method, options] = attached.parameter_groups()
        return self.known[method, options]

    @property
    def ffns(self) -> ModelShape:
        """The base's width and the FFNs beside which an adapter attaches; no other size. Raises ValueError where none
        can."""
        if self._sites is None:
            model = empty_model(self.config)
            nothing = {"ffn": 0, "query": 0, "value": 0, "parameters": 0}
            self._sites = ModelShape(hidden=hidden_size(model), layers=len(parallel_ffns(model)), **nothing)
        return self._sites
