"""Operations -> seconds on a card and its host: the longer of an operation's arithmetic and bytes, plus overhead."""

import math

from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.machine import Operation

_PRODUCTS = (
    "mm.",
    "addmm.",
    "bmm.",
    "baddbmm.",
    "addbmm.",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_att",
)
_COPIES = ("index_select.", "index.", "embedding.", "_to_copy.", "clone.", "cat.", "zeros_like.")
# glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks are new pages each time.
_FRESH_BYTES = 32 * 2**20
_ROW_DOTS = ("_embedding_bag", "embedding_bag")
_BY_ELEMENT = ("topk.", "sort.", "masked_fill", "index_put", "_index_put", "nonzero")


def operation_seconds(operation: Operation, card: Card, host: Host) -> float:
    """Seconds that one operation occupies its lane when nothing else uses it; a host operation all of the host."""
    if operation.place == "host":
        return _host_seconds(operation, host)
    if operation.place == "device":
        rate, share = (card.half_rate, card.half_share) if operation.half else (card.full_rate, card.full_share)
        if not operation.name.startswith(_PRODUCTS):  # tensor cores serve products alone
            rate, share = card.full_rate, card.full_share
        moving = operation.bytes / (card.bandwidth.value * card.bandwidth_share.value)
        return max(operation.flops / (rate.value * share.value), moving, card.kernel.value)
    # Only page-locked memory can be copied without waiting; code that waits usually copies from pageable memory.
    kind = "pageable" if operation.blocking else "pinned"
    return card.copy_latency.value + operation.bytes / getattr(card, f"{operation.place}_{kind}").value


def _host_seconds(operation: Operation, host: Host) -> float:
    rate, bandwidth = math.inf, host.bandwidth.value  # element-wise work is bound by memory
    if operation.name.startswith(_PRODUCTS):
        rate = host.product_rate.value
    elif operation.name.startswith("search."):
        rate = host.search_rate.value
    elif operation.name.startswith(_ROW_DOTS):
        rate = host.dot_rate.value
    elif operation.name.startswith(_BY_ELEMENT):
        rate = host.element_rate.value
    elif operation.name.startswith(_COPIES) and _written_bytes(operation) > _FRESH_BYTES:
        bandwidth = host.fresh_bandwidth.value
    return host.overhead.value + max(operation.flops / rate, operation.bytes / bandwidth)


def _written_bytes(copy: Operation) -> float:
    """A copy writes half of its bytes; a cast between fp32 and a half type a third or two."""
    if copy.name.startswith("_to_copy."):
        return copy.bytes / 3 if copy.half else copy.bytes * 2 / 3
    return copy.bytes / 2
