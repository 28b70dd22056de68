"""Moving rows: keys and values lie beside each other, so that one call moves both."""

from collections.abc import Iterator

import torch

from meft_bench.bench.changes.frame import Change
from meft_bench.bench.changes.sizes import Sizes
from meft_bench.meft.engine import kernels, memory


def changes(sizes: Sizes) -> Iterator[Change]:
    """Gathering U rows as bf16 in one call, against keys and then values."""
    layer, D = sizes.layer(), sizes.hidden
    both_U2D = layer.out_U2D[torch.bfloat16]
    apart = [memory.empty((layer.touched, D), both_U2D.dtype, both_U2D.device) for _ in range(2)]

    def once() -> None:
        kernels.gather(layer.rows_R2D.flatten(1), layer.index_U, both_U2D)

    def twice() -> None:
        for half, out_UD in enumerate(apart):
            kernels.gather(layer.rows_R2D[:, half], layer.index_U, out_UD)

    moved = layer.touched * 2 * D * (4 + 2)
    yield Change(
        name="gather: keys and values in one call",
        old=twice,
        new=once,
        sizes={"R": sizes.neurons, "U": layer.touched, "D": D},
        counts={"calls": (2, 1), "bytes": (moved, moved)},
        before=layer.draw,
    )
