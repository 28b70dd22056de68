"""A short spec per method, on the embedded model, and what tests of the loop and the harness share."""

import pytest
import torch

from meft_bench.harness.spec import RunSpec
from meft_bench.train import loop
from meft_bench.train.methods import complete_options

# Every method, and the MEFT variants whose state differs: lazy Adam's per-row steps, frozen keys, the union reading.
METHODS = {
    "full": ("full", {}),
    "lomo": ("lomo", {}),
    "lora": ("lora", {"rank": 2, "targets": "all", "alpha": "rank"}),
    "adapter_h": ("adapter_h", {"size": 4}),
    "adapter_h_identity": ("adapter_h", {"size": 4, "start": "identity"}),
    "adapter_h_spread": ("adapter_h", {"size": 4, "start": "spread"}),
    "parallel_adapter": ("parallel_adapter", {"neurons": 12, "activation": "silu"}),
    "parallel_adapter_shrunk": ("parallel_adapter_shrunk", {"neurons": 12, "share": 0.9}),
    "parallel_adapter_offload": ("parallel_adapter_offload", {"neurons": 12}),
    "adalomo": ("adalomo", {}),
    "galore": ("galore", {"rank": 16, "every": 3}),
    "lsp_offload": ("lsp_offload", {"subspace": 16, "every": 3, "rounds": 2}),
    "product_keys": ("product_keys", {"subkeys": 6, "heads": 2, "kept": 4, "key_width": 4}),
    "shira": ("shira", {"rank": 2}),
    "meft": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4}),
    "meft_no_ke": ("meft", {"neurons": 24, "kept": 4, "key_experts": False}),
    "meft_lazy": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4, "adam": "lazy"}),
    "meft_frozen_keys": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4, "frozen_keys": True}),
    "meft_union": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4, "reading": "union"}),
    "meft_distinctive": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4, "distinctive": 8}),
    "meft_device": ("meft", {"neurons": 24, "experts": 6, "probed": 2, "kept": 4, "placement": "device"}),
}


def short_spec(name: str, **fields) -> RunSpec:
    """A run of eight small steps of one of METHODS."""
    method, options = METHODS[name]
    settings = {"task": "facts", "steps": 8, "batch_size": 8, "train_rows": 30, "eval_rows": 12, "learning_rate": 5e-3}
    return RunSpec(method=method, options=complete_options(method, options), **{**settings, **fields})


@pytest.fixture
def overflowing_update(monkeypatch):
    """Every update leaves an infinity in the first trained tensor, as one beyond float32 does; losses stay finite."""
    step = loop.one_step

    def overflow(optimizer, *rest):
        done = step(optimizer, *rest)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0][0, 0] = float("inf")
        return done

    monkeypatch.setattr(loop, "one_step", overflow)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    """Name of one method of METHODS."""
    return request.param
