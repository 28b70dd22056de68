"""Equal device bytes by the closed formula, and how runs are compared."""

from typing import Any

import pytest

from meft_bench.neighbours import shrink
from meft_bench.train.models import load_model, shape_of
from meft_bench.train.shrink import shrink_ffns


@pytest.mark.parametrize("share", shrink.SHARES)
def test_what_is_freed_is_spent_to_the_last_neuron(share: float) -> None:
    model = load_model("embedded", None, "float32", "cpu").model
    shape = shape_of(model)
    row = 2 * shape.hidden * shape.layers  # parameters of one neuron in every layer
    whole = shrink.device_bytes(shape.parameters, 21 * row)
    gone = shrink_ffns(model, share)
    spent = shrink.device_bytes(shape.parameters - gone, (21 + shrink.freed_neurons(share)) * row)
    assert spent <= whole < spent + shrink.TRAINED_BYTES * row
    assert spent / whole > 0.99


def record(spec: Any, score: float, trained: int) -> dict[str, Any]:
    return {
        "spec": spec.to_dict(),
        "run_key": spec.run_key,
        "state": "ok",
        "quality": {"test": {"metrics": {"contains": {"mean": score}}}},
        "parameters": {"trainable": trained},
        "probes": {"base_text": {"nats_per_token": 2.0}},
    }


def test_runs_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "_shrunk_base", lambda share, quick: {"parameters": round(1000 * share),
                                                                      "nats_per_token": 3 - share})  # fmt: skip
    specs = shrink.specs(True)
    assert [s.method for s in specs] == ["parallel_adapter", *["parallel_adapter_shrunk"] * 4]
    assert [s.options["neurons"] for s in specs] == [21, 47, 21, 73, 21]
    scores = (0.5, 0.6, 0.4, 0.7, 0.3)
    found = shrink.run(True, [record(s, x, s.options["neurons"]) for s, x in zip(specs, scores, strict=True)])
    first = found["compared"][0]
    assert (first["share"], first["spent"], first["differences"]) == (0.9, True, [0.1])
    assert first["bytes_of_whole"] == round((900 * 4 + 47 * 16) / (1000 * 4 + 21 * 16), 4)
    base, at_90, at_80 = shrink.findings(found)
    assert "2.000 nats whole, 2.100 at 90 %, 2.200 at 80 %" in base.says
    assert "90 % of the base and 47 neurons a layer: 0.600; all of it and 21: 0.500" in at_90.says
    assert at_90.says.endswith("with the bytes left over 0.400") and at_80.interval == (0.2, 0.2)


def test_every_size_share_and_seed_is_run() -> None:
    assert len({s.run_key for s in shrink.specs(False)}) == 2 * 5 * 3
