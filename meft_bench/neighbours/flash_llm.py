"""Flash-LLM loads weights as sparse and computes them as dense. In MEFT it is the activations that are sparse: K of R
neurons for each of T tokens. So the same question is when to compute only the chosen pairs, and when all of them.

The forward products of an adapter, out = relu(mask(h K^T)) V, in four ways: the chosen pairs alone (the engine's own
kernel), torch's CSR products, dense products over all R rows under a mask, and dense products over the union's rows
gathered first, which is Flash-LLM's way and the engine's on a GPU. Timed here in turn on one thread, so that it is the
products that are compared and not how each spreads them; on a card by bytes and operations.
T tokens, D hidden size, R neurons, K kept, U rows of the union; density is K / R, neurons drawn evenly.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding, extent

if TYPE_CHECKING:
    from torch import Tensor

    from meft_bench.simulate.cards import Card

NUMERICS = 1
TITLE = "Flash-LLM"
PAPER = "2309.10285"
CLAIM = (
    "Weights with unstructured zeros, loaded as sparse and computed as dense, are multiplied 2.9 times as fast as by "
    "Sputnik and 1.5 times as fast as by SparTA on average."
)
TESTED = (
    "The products of the chosen neurons alone against CSR, masked dense products, and dense products over the gathered "
    "union: where they cross, by tokens and density."
)
MINUTES = 3
USES = ("meft", "bench", "simulator")

PAIRS, CSR, MASKED, UNION = "pairs", "csr", "masked dense", "union dense"
ENGINE_DENSITY = 1 / 8
"""Above it the engine computes densely on a CPU (meft/engine/products.py: U <= 8 K)."""
_INDEX, _HALF = 8, 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed, and what is modelled."""

    hidden: int = 1024
    neurons: int = 2048
    tokens: tuple[int, ...] = (8, 64, 512)
    densities: tuple[float, ...] = (0.002, 0.01, 0.03, 0.1, 0.3)
    rounds: int = 7
    cards: tuple[str, ...] = ("24GB", "80GB")
    card_hidden: int = 4096
    card_neurons: int = 6144
    card_tokens: tuple[int, ...] = (16, 512, 4096)


def run(quick: bool) -> dict[str, Any]:
    from tqdm import tqdm

    from meft_bench.bench import common
    from meft_bench.meft.engine import native

    sizes = Sizes(hidden=16, neurons=64, tokens=(4,), densities=(0.05, 0.5), rounds=2) if quick else Sizes()
    places = [(tokens, density) for tokens in sizes.tokens for density in sizes.densities]
    with common.threads(1):
        rows = [_timed(t, d, sizes) for t, d in tqdm(places, desc="products", leave=False, disable=quick)]
    return {
        "evidence": "simulated",
        "evidence_of": {"rows": "measured", "modelled": "simulated"},
        "settings": {**dataclasses.asdict(sizes), "kernels": native.status(), "threads": 1},
        "rows": rows,
        "modelled": [_modelled(card, tokens, sizes) for card in sizes.cards for tokens in sizes.card_tokens],
    }


# ---- measured ----


def _timed(tokens: int, density: float, sizes: Sizes) -> dict[str, Any]:
    """One place: seconds of every way, round by round."""
    import torch

    from meft_bench.bench import common

    generator = torch.Generator().manual_seed(0)
    kept = max(1, round(density * sizes.neurons))
    h_TD = torch.randn(tokens, sizes.hidden, generator=generator)
    rows_R2D = torch.randn(sizes.neurons, 2, sizes.hidden, generator=generator)
    index_TK = chosen(tokens, sizes.neurons, kept, generator)
    contenders = ways(h_TD, rows_R2D, index_TK)
    times = common.timed_rounds(contenders, sizes.rounds)
    return {
        "tokens": tokens, "kept": kept, "density": round(kept / sizes.neurons, 5),
        "union": int(index_TK.unique().numel()),
        "rounds_s": {name: common.rounded(seconds) for name, seconds in times.items()},
    }  # fmt: skip


def chosen(tokens: int, neurons: int, kept: int, generator: Any) -> "Tensor":
    """Each token's neurons [T, K], in order, drawn evenly."""
    import torch

    order_TR = torch.rand(tokens, neurons, generator=generator).argsort(1)
    return order_TR[:, :kept].sort(1).values.contiguous()


def ways(h_TD: "Tensor", rows_R2D: "Tensor", index_TK: "Tensor") -> dict[str, Callable[[], "Tensor"]]:
    """Name -> the adapter's output [T, D], fp32. Every way gets the chosen neurons and makes of them what it needs."""
    return {
        PAIRS: lambda: pairs(h_TD, rows_R2D, index_TK),
        CSR: lambda: csr(h_TD, rows_R2D, index_TK),
        MASKED: lambda: masked(h_TD, rows_R2D, index_TK),
        UNION: lambda: union_dense(h_TD, rows_R2D, index_TK),
    }


def pairs(h_TD: "Tensor", rows_R2D: "Tensor", index_TK: "Tensor") -> "Tensor":
    """The chosen pairs alone: the engine's kernel, or embedding bags where there is none."""
    import torch
    import torch.nn.functional as F

    from meft_bench.meft.engine import native

    if native.fits_products(h_TD, rows_R2D, index_TK):
        return native.adapter_forward(h_TD, rows_R2D, index_TK, None, False)[0]
    T, K = index_TK.shape
    starts, owner = torch.arange(0, T * K, K), torch.arange(T).repeat_interleave(K)
    keys_RD, values_RD = rows_R2D[:, 0].contiguous(), rows_R2D[:, 1].contiguous()
    # The gradient of embedding_bag for its weights is this dot product.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        h_TD, keys_RD, index_TK.reshape(-1), starts, owner, 0
    )
    return F.embedding_bag(index_TK, values_RD, per_sample_weights=dots.view(T, K).relu(), mode="sum")


def csr(h_TD: "Tensor", rows_R2D: "Tensor", index_TK: "Tensor") -> "Tensor":
    """torch's products with a sparse T x R matrix: the dots where it has entries, then the matrix times the values."""
    import warnings

    import torch

    (T, K), R = index_TK.shape, rows_R2D.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls CSR a beta
        starts, columns = torch.arange(0, T * K + 1, K), index_TK.reshape(-1)
        pattern = torch.sparse_csr_tensor(starts, columns, torch.zeros(T * K), size=(T, R))
        dots = torch.sparse.sampled_addmm(pattern, h_TD, rows_R2D[:, 0].T, beta=0.0).values()
        return torch.sparse_csr_tensor(starts, columns, dots.relu(), size=(T, R)) @ rows_R2D[:, 1]


def masked(h_TD: "Tensor", rows_R2D: "Tensor", index_TK: "Tensor") -> "Tensor":
    """All pairs, those that were not chosen set to zero."""
    scores_TR = h_TD @ rows_R2D[:, 0].T
    mask_TR = scores_TR.new_zeros(scores_TR.shape).scatter_(1, index_TK, 1.0)
    return (scores_TR.relu_() * mask_TR) @ rows_R2D[:, 1]


def union_dense(h_TD: "Tensor", rows_R2D: "Tensor", index_TK: "Tensor") -> "Tensor":
    """The same over the rows that some token chose, copied together first."""
    union_U, local = index_TK.unique(return_inverse=True)
    return masked(h_TD, rows_R2D[union_U], local.view(index_TK.shape))


# ---- modelled ----


def _modelled(name: str, tokens: int, sizes: Sizes) -> dict[str, Any]:
    from meft_bench.simulate import cards

    card = cards.card(name)
    density = [10 ** (i / 20) for i in range(-80, 1)]
    seconds = [card_seconds(card, tokens, d, sizes.card_neurons, sizes.card_hidden) for d in density]

    def until(way: str) -> float | None:
        """The density below which the pairs are faster: 1 if they always are, null if they never are."""
        where = crossing(density, [s[way] / s[PAIRS] for s in seconds])
        return None if where is None else min(1.0, where)

    return {
        "card": name, "tokens": tokens,
        "at_1_percent_s": {way: float(f"{s:.4g}") for way, s in
                           card_seconds(card, tokens, 0.01, sizes.card_neurons, sizes.card_hidden).items()},
        "pairs_until_masked_dense": until(MASKED), "pairs_until_union_dense": until(UNION),
    }  # fmt: skip


def card_seconds(card: "Card", tokens: int, density: float, neurons: int, hidden: int) -> dict[str, float]:
    """Way -> seconds of the forward products on a card with rows in bf16, the longer of bytes and operations.

    Pairs and CSR read both rows of every pair (no two tokens share a read) and multiply element by element; dense
    products read every row once, run at the half-precision rate, and write and read T x R scores and a mask. The union
    of T draws of K of R neurons is R (1 - (1 - K / R)^T) rows, which are read and written once more.
    """
    bandwidth = card.bandwidth.value * card.bandwidth_share.value
    single = card.full_rate.value * card.full_share.value
    half = card.half_rate.value * card.half_share.value
    chosen_pairs = tokens * density * neurons
    union = neurons * (1 - (1 - density) ** tokens)
    row = 2 * hidden * _HALF

    def dense(rows: float) -> float:
        return max(4 * tokens * rows * hidden / half, (rows * row + 4 * tokens * rows * _HALF) / bandwidth)

    operations = 4 * chosen_pairs * hidden / single
    return {
        PAIRS: max(operations, chosen_pairs * (row + _INDEX) / bandwidth),
        CSR: max(operations, chosen_pairs * (row + 3 * _INDEX) / bandwidth),
        MASKED: dense(neurons),
        UNION: 2 * union * row / bandwidth + dense(union),
    }


def crossing(densities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The density at which a ratio of times that falls with density passes 1, along its logarithm; None if it is
    below 1 from the first density on, infinity if it stays above."""
    if ratios[0] < 1:
        return None
    for (a, high), (b, low) in zip(zip(densities, ratios, strict=True), zip(densities[1:], ratios[1:], strict=True),
                                   strict=False):  # fmt: skip
        if low < 1:
            weight = math.log(high) / math.log(high / low)
            return round(math.exp(math.log(a) + weight * math.log(b / a)), 5)
    return math.inf


# ---- what came out ----


def findings(found: dict[str, Any]) -> list[Finding]:
    made = []
    for tokens in sorted({row["tokens"] for row in found["rows"]}):
        rows = sorted((r for r in found["rows"] if r["tokens"] == tokens), key=lambda r: r["density"])
        made += [_crossing_of(rows, way, words) for way, words in _DENSE.items()]
    return [*made, _csr_of(found["rows"]), *map(_on_card, found["modelled"])]


_DENSE = {MASKED: "masked dense products over all rows", UNION: "dense products over the gathered union"}


def _ratios(row: dict[str, Any], way: str) -> list[float]:
    """Times that the way takes of the pairs' time, round by round."""
    return [a / b for a, b in zip(row["rounds_s"][way], row["rounds_s"][PAIRS], strict=True)]


def _crossing_of(rows: list[dict[str, Any]], way: str, words: str) -> Finding:
    """Where the chosen pairs stop being faster, by the medians of the rounds; the interval is of single rounds."""
    densities = [r["density"] for r in rows]
    by_round = list(zip(*(_ratios(r, way) for r in rows), strict=True))
    where = crossing(densities, [statistics.median(_ratios(r, way)) for r in rows])
    about = f"At {rows[0]['tokens']} tokens on this CPU, the chosen pairs alone are"
    if where is None or math.isinf(where):
        edge, end = (densities[0], 0) if where is None else (densities[-1], -1)
        ratios = _ratios(rows[end], way)
        times = statistics.median(ratios)
        says = (f"{about} {'slower' if where is None else 'faster'} than {words} at every density "
                f"({times:.2f} times as fast at {100 * edge:.1f} %).")  # fmt: skip
        return Finding(says=says, evidence="measured", n=len(ratios), of="rounds", interval=extent(ratios),
                       covers="times, lowest to highest round")  # fmt: skip
    says = f"{about} faster than {words} below a density of {100 * where:.1f} %"
    if way == MASKED:
        says += f" (the engine goes over at {100 * ENGINE_DENSITY:g} %)"
    single = [100 * c for ratios in by_round if (c := crossing(densities, ratios)) is not None and math.isfinite(c)]
    covers = "% density, lowest to highest of the rounds that cross" if single else ""
    return Finding(says=f"{says}.", evidence="measured", n=len(by_round), of="rounds",
                   interval=extent(single) if single else None, covers=covers, digits=1)  # fmt: skip


def _csr_of(rows: list[dict[str, Any]]) -> Finding:
    times = [statistics.median(_ratios(row, CSR)) for row in rows]
    return Finding(
        says=f"torch's CSR products take {statistics.median(times):.1f} times as long as the chosen pairs alone.",
        evidence="measured",
        n=len(times),
        of=f"places (tokens, density) of {len(rows[0]['rounds_s'][CSR])} rounds",
        interval=extent(times),
        covers="times, lowest to highest place",
        digits=1,
    )


def _on_card(row: dict[str, Any]) -> Finding:
    where, at = row["pairs_until_union_dense"], row["at_1_percent_s"]
    less = at[PAIRS] / at[UNION]
    if where is None:
        how = "slower than dense products over the gathered union at every density"
    elif where == 1:
        how = "faster than dense products over the gathered union at every density"
    else:
        how = f"faster than dense products over the gathered union below a density of {100 * where:.2g} %"
    says = f"On a {row['card']} card at {row['tokens']} tokens, the chosen pairs alone would be {how}"
    says += f"; at 1 % they take {less:.1f} times as long."
    return Finding(says=says, evidence="simulated", n=1, of="cost model")
