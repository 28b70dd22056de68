"""Finding a token's neurons with and without Key-Experts as R grows (paper section 4.2), whole: router product, top-P,
search, top-K, union. Beside it what else could search: narrow copies of the keys, and approximate indexes (narrow.py,
neighbours.py).

T tokens, D hidden size, R neurons, N experts, m = R / N per expert, P probed, K kept.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_bench.bench import common
from meft_bench.bench.common import fitted_exponent, open_folder
from meft_bench.bench.narrow import narrow_scoring
from meft_bench.bench.neighbours import neighbours
from meft_bench.meft import routing
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.store import NeuronStore
from meft_bench.train.methods import require_positive

NUMERICS = 3
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
HIDDEN = 256
NEURONS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, kw_only=True)
class Wide:
    """What is measured at a real model's width; neurons=() leaves it out."""

    neurons: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    hidden: int = 4096
    dense_repeats: int = 3
    """Rounds that also search without Key-Experts, at seconds each."""
    narrow_neurons: int = 16384
    """R of the comparison of bf16 and int8 keys."""
    neighbours_neurons: int = 4096
    """R of the approximate indexes; building one takes milliseconds a row."""
    updated: int = 256
    """Rows whose keys change per step there."""


def retrieval_benchmark(
    output: Path,
    repeats: int = 7,
    *,
    neurons: Sequence[int] = NEURONS,
    hidden: int = HIDDEN,
    tokens: int = common.TOKENS,
    kept: int = 64,
    probed: int = 8,
    wide: Wide | None = None,
) -> str:
    """Time routing.select with and without Key-Experts; write retrieval.json and .md into output, return the Markdown.

    neurons are the sizes R; N is default_experts(R). Each repeat runs every size, with and without, once on the same
    fresh random hidden states [tokens, hidden] fp32, so its fitted exponents stand on equal conditions. Times are
    seconds. The result's own fields are those of `hidden`; "wide", "narrow" and "neighbours" those of Wide (its
    defaults: None). Raises ValueError for bad arguments before anything runs.
    """
    require_positive(repeats=repeats, hidden=hidden, tokens=tokens)
    wide = Wide() if wide is None else wide
    require_positive(**{k: v for k, v in dataclasses.asdict(wide).items() if k != "neurons"})
    sizes = _Scaling(tuple(neurons), hidden, tokens, kept, probed)
    wider = _Scaling(wide.neurons, wide.hidden, tokens, kept, probed) if wide.neurons else None
    open_folder(output)
    result = {
        **common.about(repeats, hidden=hidden, tokens=tokens, kept=kept, probed=probed),
        "about": "routing.select on the host, random fp32 hidden states; a dot product is D multiply-adds. Counts are "
        "exact, times are this machine's: a dense product over R rows runs at a higher rate per multiply-add than the "
        "search of chosen experts.",
        **sizes.measure(repeats, repeats),
    }
    if wider is not None:
        result["wide"] = {"hidden": wide.hidden, **wider.measure(repeats, min(wide.dense_repeats, repeats))}
        config = MeftOptions(neurons=wide.narrow_neurons, kept=kept, probed=probed)
        result["narrow"] = narrow_scoring(config, wide.hidden, tokens, repeats)
        result["neighbours"] = neighbours(wide.neighbours_neurons, wide.hidden, tokens, kept, wide.updated)
    return common.write_result(output, "retrieval", result, _text(result))


class _Scaling:
    """One width at several R. Raises ValueError for fewer than two sizes, or sizes that do not fit together."""

    def __init__(self, neurons: tuple[int, ...], hidden: int, tokens: int, kept: int, probed: int) -> None:
        if len(set(neurons)) < 2:
            raise ValueError(f"neurons={neurons} must hold at least two sizes: an exponent is fitted through them")
        self.neurons, self.hidden, self.tokens = neurons, hidden, tokens
        self.with_ke = [MeftOptions(neurons=R, kept=kept, probed=probed) for R in neurons]
        self.without = [MeftOptions(neurons=R, kept=kept, key_experts=False) for R in neurons]

    def measure(self, repeats: int, dense_repeats: int) -> dict[str, Any]:
        """Rows and exponents; dense_repeats rounds also search all keys."""
        why = common.lacks_memory(sum(self.neurons) * self.hidden * 8)
        if why:
            return {"skipped": why, "rows": []}
        generator, h = torch.Generator().manual_seed(0), [torch.empty(0)]
        contenders, slow = {}, {}
        for config, flat in zip(self.with_ke, self.without, strict=True):
            store = NeuronStore(config, self.hidden, generator, torch.device("cpu"))
            contenders[f"with {config.neurons}"] = _select(h, store, config)
            contenders[f"without {config.neurons}"] = _select(h, store, flat)
            slow[f"without {config.neurons}"] = dense_repeats

        def fresh() -> None:
            h[0] = torch.randn(self.tokens, self.hidden, generator=generator)

        times = common.timed_rounds(contenders, repeats, fresh, slow if dense_repeats < repeats else None)
        return self._summary(times)

    def _summary(self, times: dict[str, list[float | None]]) -> dict[str, Any]:
        rows = []
        for config, flat in zip(self.with_ke, self.without, strict=True):
            own, dense = times[f"with {config.neurons}"], times[f"without {config.neurons}"]
            rows.append({
                "neurons": config.neurons,
                "experts": config.experts,
                "expert_size": config.expert_size,
                "with_ke_s": round(common.median(own), 6),
                "with_ke_times_s": common.rounded(own),
                "without_ke_s": round(common.median(dense), 6),
                "without_ke_times_s": common.rounded(dense),
                "without_over_with": common.ratios(dense, own),
                "dot_products_per_token_with_ke": dot_products_per_token(config),
                "dot_products_per_token_without_ke": dot_products_per_token(flat),
            })  # fmt: skip
        made: dict[str, Any] = {"rows": rows}
        for name, configs in (("with", self.with_ke), ("without", self.without)):
            rounds = zip(*(times[f"{name} {R}"] for R in self.neurons), strict=True)
            found = [round(fitted_exponent(self.neurons, t), 4) for t in rounds if None not in t]
            counts = [dot_products_per_token(c) for c in configs]
            made[f"exponents_{name}_ke"] = found
            made[f"exponent_{name}_ke"] = round(statistics.median(found), 4)
            made[f"count_exponent_{name}_ke"] = round(fitted_exponent(self.neurons, counts), 4)
        return made


def _select(h: list[torch.Tensor], store: NeuronStore, config: MeftOptions) -> Any:
    """A call that selects for the hidden states h[0] with the keys as the store lays them out."""
    router_ND = store.handle("router").detach() if config.key_experts else None
    keys_RD = store.rows_R2D[:, 0]
    return lambda: routing.select(h[0], keys_RD, router_ND, config, None)


def dot_products_per_token(config: MeftOptions) -> int:
    """Dot products of length D that finding one token's neurons takes: N + P m with Key-Experts, R without."""
    return config.candidates + (config.experts or 0 if config.key_experts else 0)


# ---- Markdown ----


def _text(result: dict[str, Any]) -> str:
    s = result["settings"]
    head = (
        f"Finding K={s['kept']} neurons per token on the host, T={s['tokens']} random tokens, P={s['probed']}, "
        f"{s['threads']} threads on {result['cpu']}; {s['kernels']}; medians of {s['repeats']} repeats (measured; dot "
        "products counted exactly)."
    )
    parts = [head, *_scaling_text(result, s["hidden"])]
    if "wide" in result:
        parts += _scaling_text(result["wide"], result["wide"]["hidden"])
        parts += _narrow_text(result["narrow"]) + _neighbours_text(result["neighbours"])
    return "\n".join(parts) + "\n"


def _scaling_text(made: dict[str, Any], hidden: int) -> list[str]:
    if made.get("skipped"):
        return ["", f"D={hidden}: not run, {made['skipped']}."]
    lines = [
        "",
        f"D={hidden}:",
        "",
        "| R | N | m | dot products with Key-Experts | without | with Key-Experts, ms | without, ms | times faster |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in made["rows"]:
        counts = f"{r['dot_products_per_token_with_ke']} | {r['dot_products_per_token_without_ke']}"
        lines.append(
            f"| {r['neurons']} | {r['experts']} | {r['expert_size']} | {counts} | {1000 * r['with_ke_s']:.2f} | "
            f"{1000 * r['without_ke_s']:.2f} | {statistics.median(r['without_over_with']):.1f} |"
        )
    return [
        *lines,
        "",
        f"Grows as R to the power of: counted {made['count_exponent_with_ke']:.2f} with Key-Experts, "
        f"{made['count_exponent_without_ke']:.2f} without; measured {common.spread(made['exponents_with_ke'])} with, "
        f"{common.spread(made['exponents_without_ke'])} without.",
    ]


def _narrow_text(narrow: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Keys scored in fewer bits, with Key-Experts, D={narrow['hidden']}, R={narrow['neurons']}: the share of the "
        "neurons that fp32 keeps which they keep too, mean over the same tokens.",
        "",
        "| keys | recall | ms | times faster than fp32 |",
        "|---|---:|---:|---:|",
    ]
    for r in narrow["rows"]:
        faster = statistics.median(r["times_faster_than_fp32"])
        lines.append(f"| {r['scoring']} | {r['recall']:.4f} | {1000 * r['seconds']:.2f} | {faster:.2f} |")
    return lines


def _neighbours_text(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Approximate indexes on the same keys, D={found['hidden']}, R={found['neurons']}, with {found['updated']} "
        "keys changed per step; recall against the K largest of all key . h, on random states and on states that lean "
        "towards keys. A step is update + search. Key-Experts searches by its router, here an untrained one: training "
        "makes the two agree, and no index lags behind.",
        "",
        "| search | build, s | update, ms | search, ms | recall, random | recall, leaning |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in found["rows"]:
        if r.get("skipped"):
            lines.append(f"| {r['name']} | {r['skipped']} | | | | |")
            continue
        lines.append(
            f"| {r['name']} | {r['build_s']:.2f} | {1000 * r['update_s']:.1f} | {1000 * r['search_s']:.1f} | "
            f"{r['recall']['random']:.3f} | {r['recall']['leaning']:.3f} |"
        )
    return lines
