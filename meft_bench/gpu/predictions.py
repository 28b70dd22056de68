"""What the simulator says of every row of a session, before it is measured.

results/gpu/predictions.json holds it for known cards, made from a clean commit (`meft-bench gpu --predict`). A session
on another card, or with code of other numbers, makes its own first. U is taken as R: the weights are random and the
tokens drawn from the whole vocabulary, so that nearly every neuron is used. Rows of few tokens have no prediction.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_bench.gpu.rows import List, Row, at_7b
from meft_bench.harness.numerics import profile_numerics
from meft_bench.profile.pool import Pool
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import Machines, simulated_row
from meft_bench.profile.spec import Union
from meft_bench.profile.variants import KNOWN
from meft_bench.provenance import provenance
from meft_bench.simulate import cards
from meft_bench.write import write_json

CARDS = {"h100": "server", "h200": "server", "rtx3090": "desktop", "rtx4090": "desktop"}
"""Cards whose predictions are kept, and the host around each."""
FILE = Path("results/gpu/predictions.json")
SCHEMA = 1


def write_predictions(
    path: Path, names: Iterable[str] = tuple(CARDS), wanted: List | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Simulate every row, time it on these cards and write the file; returns its content. wanted: None takes the
    session's. workers: processes, one per core at most; None takes as many."""
    wanted = wanted or at_7b()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "evidence": "simulated",
        "model": wanted.model,
        "numerics": numerics(wanted),
        "cards": predictions(tuple(names), wanted, workers),
        "provenance": provenance(1),
    }
    write_json(path, content)
    return content


def numerics(wanted: List) -> dict[str, int | str]:
    """The numbers of what makes the predictions."""
    return profile_numerics({KNOWN[row.variant].method for row in wanted.rows})


def predictions(names: Sequence[str], wanted: List, workers: int | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Card -> Row.name -> tokens_per_s (by micro-batches a step) and device_bytes, or "reason" why there is nothing.
    Raises ValueError for an unknown card."""
    known = {name: (cards.card(name), cards.host(CARDS.get(name, "server"))) for name in names}
    jobs = [(row, wanted.model, wanted.config, known) for row in wanted.rows]
    with Pool({}, workers) as processes:
        made = {row.name: told for row, told in processes.each(_predicted, jobs, "predictions")}
    return {name: {row.name: made[row.name][name] for row in wanted.rows} for name in names}


def _predicted(row: Row, model: str, config: Any, known: Machines) -> dict[str, dict[str, Any]]:
    """Card -> what is told of the row there."""
    import torch

    from meft_bench.profile import shapes
    from meft_bench.train.models import shape_of

    if row.tokens:
        return dict.fromkeys(known, {"reason": "its U is what the run counts"})
    card, host = next(iter(known.values()))
    shape = shape_of(shapes.build(config, "meta", torch.bfloat16, random=False))
    counts = tuple(sorted({1, *row.accumulations}))
    setting = Setting(config=config, shape=shape, card=card, host=host, accumulations=counts)
    all_rows = Union(rows=row.neurons, source="random weights and tokens: U taken as R", evidence="assumed")
    try:
        made, _ = simulated_row(row.spec(model, all_rows), setting, machines=known)
    except (ValueError, RuntimeError) as error:  # what the simulation does not know yet
        return dict.fromkeys(known, {"reason": f"not simulated: {str(error).splitlines()[0][:160]}"})
    peak = {"device_bytes": made["memory"]["device_peak_bytes"]}
    speeds = made["elsewhere"]
    return {name: {"tokens_per_s": speeds[name]["tokens_per_s_by_accumulation"], **peak} for name in known}


def kept(path: Path, card: str, wanted: List) -> tuple[dict[str, dict[str, Any]], str]:
    """(predictions of the card from a file, where they are from); nothing and why where none of them count."""
    if not path.is_file():
        return {}, f"{path} is not here"
    content = read_predictions(path)
    if content["numerics"] != numerics(wanted) or content["model"] != wanted.model:
        return {}, f"{path.name} was made by an earlier version of the code or of another model"
    if card not in content["cards"]:
        return {}, f"{path.name} knows no {card}"
    commit = content["provenance"].get("commit") or "an unknown commit"
    return content["cards"][card], f"simulated from {commit} before the session"


def read_predictions(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file when it is broken."""
    from meft_bench.reading import JSON_BYTES, read_json

    try:
        content = read_json(path, JSON_BYTES, "predictions")
        if content["schema"] != SCHEMA or not isinstance(content["cards"], Mapping):
            raise ValueError(f"schema {content['schema']} is not {SCHEMA}")
        content["numerics"], content["model"], content["provenance"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} holds no predictions ({error}): make them with meft-bench gpu --predict"
        ) from None
    return content


def error_of(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """Micro-batches a step -> predicted over measured tokens/s, less 1: above 0 the prediction promises too much.
    measured: tokens_per_s_by_accumulation."""
    told = predicted.get("tokens_per_s") or {}
    return {a: round(told[a] / measured[a] - 1, 4) for a in measured if told.get(a)}
