"""Approximate nearest neighbours instead of Key-Experts: the paper sets them aside because keys change as they train.

Measured: build once, then per step update the keys that changed and search all tokens. faiss's inverted lists remove
and add rows; hnswlib links a row anew. Both look for the largest key . h.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meft_bench.bench import common
from meft_bench.bench.narrow import recall
from meft_bench.meft import routing
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.dense import fresh_keys

LISTS, PROBED_LISTS = 64, 8
LINKS, BREADTH = 16, 64
"""hnswlib's M, and its ef while building and searching (at least K)."""
_INSTALL = 'not installed: pip install "meft-bench[bench]"'
_STEPS = 3


class Index:
    """What is compared: made over all keys, told of changed ones, asked for the K best of each token."""

    def __init__(self, keys_RD: Tensor, kept: int) -> None:
        raise NotImplementedError

    def update(self, index_U: Tensor, keys_UD: Tensor) -> None:
        raise NotImplementedError

    def search(self, h_TD: Tensor) -> Tensor:
        """Neuron numbers [T, K], -1 where fewer were found."""
        raise NotImplementedError


class FaissLists(Index):
    """faiss.IndexIVFFlat by inner product, PROBED_LISTS of LISTS lists searched."""

    def __init__(self, keys_RD: Tensor, kept: int) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        R, D = keys_RD.shape
        lists = min(LISTS, R // 4)
        self.kept, self.lists = kept, faiss.IndexFlatIP(D)
        self.index = faiss.IndexIVFFlat(self.lists, D, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.min_points_per_centroid = 1  # else it warns of few rows
        self.index.train(keys_RD.numpy())
        self.index.add_with_ids(keys_RD.numpy(), torch.arange(R).numpy())
        self.index.nprobe = min(PROBED_LISTS, lists)

    def update(self, index_U: Tensor, keys_UD: Tensor) -> None:
        self.index.remove_ids(index_U.numpy())
        self.index.add_with_ids(keys_UD.numpy(), index_U.numpy())

    def search(self, h_TD: Tensor) -> Tensor:
        return torch.from_numpy(self.index.search(h_TD.numpy(), self.kept)[1])


class HnswGraph(Index):
    """hnswlib.Index by inner product."""

    def __init__(self, keys_RD: Tensor, kept: int) -> None:
        import hnswlib

        R, D = keys_RD.shape
        self.kept, self.index = kept, hnswlib.Index(space="ip", dim=D)
        self.index.init_index(max_elements=R, ef_construction=BREADTH, M=LINKS)
        self.index.set_num_threads(torch.get_num_threads())
        self.index.add_items(keys_RD.numpy(), torch.arange(R).numpy())
        self.index.set_ef(max(BREADTH, kept))

    def update(self, index_U: Tensor, keys_UD: Tensor) -> None:
        self.index.add_items(keys_UD.numpy(), index_U.numpy())

    def search(self, h_TD: Tensor) -> Tensor:
        return torch.from_numpy(self.index.knn_query(h_TD.numpy(), k=self.kept)[0].astype("int64"))


class AllKeys(Index):
    """MEFT without Key-Experts: every key scored; an update is a copy of the rows."""

    def __init__(self, keys_RD: Tensor, kept: int) -> None:
        self.keys_RD = keys_RD.clone()
        self.config = MeftOptions(neurons=keys_RD.shape[0], kept=kept, key_experts=False, selection="signed")

    def update(self, index_U: Tensor, keys_UD: Tensor) -> None:
        self.keys_RD[index_U] = keys_UD

    def search(self, h_TD: Tensor) -> Tensor:
        chosen = routing.select(h_TD, self.keys_RD, None, self.config, None)
        return chosen.union_U[chosen.local_TK]


class KeyExperts(AllKeys):
    """MEFT with Key-Experts and no gate, so that it too ranks by key . h; an untrained router of mean keys."""

    def __init__(self, keys_RD: Tensor, kept: int) -> None:
        super().__init__(keys_RD, kept)
        self.config = MeftOptions(neurons=keys_RD.shape[0], kept=kept, gate="none", selection="signed")
        mean_ND = keys_RD.view(-1, self.config.expert_size, keys_RD.shape[1]).mean(1)
        self.router_ND = mean_ND / mean_ND.norm(dim=1, keepdim=True)

    def search(self, h_TD: Tensor) -> Tensor:
        chosen = routing.select(h_TD, self.keys_RD, self.router_ND, self.config, None)
        return chosen.union_U[chosen.local_TK]


CONTENDERS: dict[str, tuple[str | None, Callable[[Tensor, int], Index]]] = {
    "all keys (exact)": (None, AllKeys),
    "Key-Experts": (None, KeyExperts),
    "faiss IVF": ("faiss", FaissLists),
    "hnswlib": ("hnswlib", HnswGraph),
}
"""Name -> (package, how to build it)."""


def neighbours(neurons: int, hidden: int, tokens: int, kept: int, updated: int, steps: int = _STEPS) -> dict[str, Any]:
    """Every search that is installed on the same random keys and tokens, interleaved step by step.

    updated rows (at most R) change per step, by a tenth of a key's length. All times are seconds.
    """
    generator = torch.Generator().manual_seed(0)
    keys_RD = fresh_keys(neurons, hidden, generator)
    built: dict[str, Index] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (package, make) in CONTENDERS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            rows[name] = {"name": name, "skipped": _INSTALL}
            continue
        start = time.perf_counter()
        built[name] = make(keys_RD, kept)
        build_s = time.perf_counter() - start
        rows[name] = {"name": name, "build_s": round(build_s, 4), "update_times_s": [], "search_times_s": [],
                      "recalls": {"random": [], "leaning": []}}  # fmt: skip
    for _ in range(steps):
        index_U = torch.randperm(neurons, generator=generator)[:updated].sort().values
        change_UD = torch.randn(index_U.shape[0], hidden, generator=generator) * 0.1 * keys_RD.std()
        keys_RD[index_U] += change_UD
        states = {"random": torch.randn(tokens, hidden, generator=generator),
                  "leaning": _leaning(keys_RD, tokens, kept, generator)}  # fmt: skip
        wanted = {kind: (h_TD @ keys_RD.T).topk(kept, dim=1).indices for kind, h_TD in states.items()}
        for name, index in built.items():
            _one_step(rows[name], index, index_U, keys_RD, states, wanted)
    for row in rows.values():
        if "skipped" not in row:
            row["update_s"] = round(common.median(row["update_times_s"]), 6)
            row["search_s"] = round(common.median(row["search_times_s"]), 6)
            row["recall"] = {kind: round(sum(r) / len(r), 4) for kind, r in row["recalls"].items()}
    return {"neurons": neurons, "hidden": hidden, "kept": kept, "updated": min(updated, neurons), "n": steps,
            "lists": LISTS, "probed_lists": PROBED_LISTS, "links": LINKS, "breadth": BREADTH,
            "rows": list(rows.values())}  # fmt: skip


def _one_step(
    row: dict[str, Any],
    index: Index,
    index_U: Tensor,
    keys_RD: Tensor,
    states: dict[str, Tensor],
    wanted: dict[str, Tensor],
) -> None:
    row["update_times_s"].append(round(common.seconds(lambda: index.update(index_U, keys_RD[index_U])), 6))
    for kind, h_TD in states.items():
        start = time.perf_counter()
        found_TK = index.search(h_TD)
        row["search_times_s"].append(round(time.perf_counter() - start, 6))
        row["recalls"][kind].append(round(recall(found_TK, wanted[kind], keys_RD.shape[0]), 5))


def _leaning(keys_RD: Tensor, tokens: int, kept: int, generator: torch.Generator) -> Tensor:
    """States [T, D] each of which leans towards K keys of its own: a structure that an index can find."""
    noise_TD = torch.randn(tokens, keys_RD.shape[1], generator=generator)
    towards_TK = torch.randint(keys_RD.shape[0], (tokens, kept), generator=generator)
    lean_TD = torch.stack([keys_RD[row].sum(0) for row in towards_TK])
    return noise_TD + lean_TD / lean_TD.std()
