"""What a record holds of the bytes that crossed the link, and of the neurons that were moved.

Symbols: R neurons per layer, K kept per token, U union of kept neurons of a micro-batch, M trainable keys and values.
"""

from meft_bench.report.records.results import Record

LINKED = ("meft", "parallel_adapter_offload")
"""Methods that move bytes over a link."""
MAIN = ("hidden", "rows", "grads")
OVERHEAD = ("index", "score", "router_hidden")
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
