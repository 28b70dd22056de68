"""What a record holds of the bytes that crossed the link, and of the neurons that were moved.

Symbols: R neurons per layer, K kept per token, U union of kept neurons of a micro-batch, M trainable keys and values.
"""

import statistics

from meft_bench.report.records.results import Record

LINKED = ("meft", "parallel_adapter_offload")
"""Methods that move bytes over a link."""
MAIN = ("hidden", "rows", "grads")
OVERHEAD = ("index", "score", "router_hidden")
_GRID_LENGTH = 16
"""Tokens of a sequence, where U/R is compared over the micro-batch."""
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def neuron_shares(record: Record) -> list[float]:
    """U/R by layer, mean over the micro-batches."""
    return [layer["mean"] / record["spec"]["options"]["neurons"] for layer in record["traffic"]["rows_moved_by_layer"]]


def kept_share(record: Record) -> float:
    """K/R; 1 for a method that has no K because it uses every neuron."""
    options = record["spec"]["options"]
    return options.get("kept", options["neurons"]) / options["neurons"]


def has_traffic(record: Record | None) -> bool:
    """True for a record of bytes that crossed a link."""
    return record is not None and record["traffic"] is not None and "by_purpose" in record["traffic"]


def per_step(record: Record, purposes: tuple[str, ...]) -> float:
    """Bytes per optimizer step for these purposes, both directions."""
    moved = record["traffic"]["by_purpose"]
    names = {f"{way}_{purpose}_bytes" for way in ("h2d", "d2h") for purpose in purposes}
    return sum(n for name, n in moved.items() if name in names) / record["spec"]["steps"]


def in_units_of_m(record: Record) -> float:
    """Elements of the main terms per micro-batch over M = 2DRL, as the paper counts; 2 for whole-matrix transfers."""
    spec = record["spec"]
    elements = per_step(record, MAIN) / spec["accumulation"] / _ELEMENT_BYTES[spec["dtype"]]
    return elements / (2 * record["parameters"]["groups"]["values"])


def grid_share(record: Record, batch: int, length: int) -> float:
    """U/R of the trained model for a micro-batch of this many sequences of this length, mean over layers."""
    for point in record["probes"]["union_grid"]:
        if (point["batch"], point["length"]) == (batch, length):
            return statistics.fmean(point["share_by_layer"])
    raise ValueError(f"run {record['run_key']} has no union share at {batch} x {length}")


def grid_rise(record: Record) -> float:
    """U/R of the largest micro-batch that was probed minus that of the smallest, 16 tokens a sequence (the shortest
    probed length where 16 was not): 1 to 128 sequences on the embedded model, 2 to 32 of 64 tokens on a large one."""
    lengths = sorted({point["length"] for point in record["probes"]["union_grid"]})
    length = _GRID_LENGTH if _GRID_LENGTH in lengths else lengths[0]
    sizes = sorted(point["batch"] for point in record["probes"]["union_grid"] if point["length"] == length)
    if len(sizes) < 2:
        raise ValueError(f"run {record['run_key']} has no union share at two micro-batches")
    return grid_share(record, sizes[-1], length) - grid_share(record, sizes[0], length)
