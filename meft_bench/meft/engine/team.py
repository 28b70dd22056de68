"""The ranks that train the same stores together: one set of rows per node, each row owned by one rank of it.

join() puts rows, gradients, moments and their books into memory that a node's ranks share, so host bytes do not grow
with them. Then, in each optimizer step:

    1. Every rank adds its gradients to the node's, in turn (turns.py), from its backward pass on.
    2. sum(), from clipping or from the step, waits for all, and sums over nodes the rows that were touched
       (exchange.py). The norm is made of the same squares in the same order on every rank, and so is the factor.
    3. Each rank makes AdamW for its rows: row modulo ranks = place, which spreads those of every expert evenly. It
       also catches up the keys among them that anybody read. Nodes do the same on their copies, to the bit.
    4. Whoever reads rows of a store waits until all ranks have made their step of it. Rows that are late all the same
       are brought up to date by who reads them, one rank at a time.

Rows are written in 3 and 4 alone, and between 2 and 3 nobody reads them, so no rank sees half a row.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meft_bench.meft.engine.exchange import Exchange
from meft_bench.meft.engine.handle import engine
from meft_bench.meft.engine.share import StoreShare, arrays
from meft_bench.meft.engine.shared import Array, Board, SharedMemory
from meft_bench.meft.engine.topology import RankFailure, Topology, here

if TYPE_CHECKING:
    from meft_bench.meft.store import NeuronStore

_SUM, _CLIP, _STEP, _LOAD, _JOIN = range(1, 6)
_SAMPLED_ROWS = 64
_EACH_ITS_OWN = ("device_budget", "overlap")
"""Options that suit a rank's device and change no number."""


class Team:
    """The ranks, and the stores that they train together. Made by join()."""

    def __init__(self, topology: Topology, stores: "Sequence[NeuronStore]", board: Board) -> None:
        self.topology, self.stores, self.board = topology, list(stores), board
        self._exchange = Exchange(topology)

    @property
    def bytes(self) -> Counter[str]:
        """What this rank has sent to other nodes: "gradients" of rows, of the "router", and lists of "rows"."""
        return self._exchange.bytes

    @property
    def shares(self) -> list[StoreShare]:
        return [share for store in self.stores if (share := store.share) is not None]

    def share_of(self, many: int) -> int:
        """Where this rank's share of so many things begins."""
        return many * self.topology.place // self.topology.beside

    @torch.no_grad()
    @engine
    def sum(self) -> bool:
        """Gradients become sums over all ranks; returns whether it was done now. Collective, once in a window; nothing
        to do again until gradients are cleared. Raises RankFailure where ranks cleared theirs at different moments."""
        for store in self.stores:
            store.prepare_gradients()
            store.collect()
        for store in self.stores:
            store.queue.wait()
        open_ones = [share for share in self.shares if not all(turns.closed for turns in share.sums)]
        if not open_ones:
            return False
        for share in open_ones:
            for turns in share.sums:
                turns.close()
        self.board.barrier(_SUM, "the sum of gradients")
        if any(len(set(turns.windows)) > 1 for share in open_ones for turns in share.sums):
            raise RankFailure("ranks cleared their gradients at different moments: every rank calls zero_grad() alike")
        if self.topology.nodes > 1:
            narrow = self.stores[0].config.wire == "bf16"
            self._exchange.sum([part for share in open_ones for part in share.parts(narrow)])
            self.board.barrier(_SUM, "the sum of gradients over nodes")
        for share in open_ones:
            share.grads.summed()
        return True

    @engine
    def sum_to_measure(self) -> None:
        """sum(), and gradients multiplied by what an earlier clipping left to AdamW. Collective."""
        if not self.sum():
            self.board.barrier(_CLIP, "clipping")  # another rank may still read what an earlier clipping measures
        for share in self.shares:
            share.multiply()
        self.board.barrier(_CLIP, "clipping")

    def enter_step(self, lr: float, weight_decay: float) -> None:
        """Return when nobody on the node reads rows any more, and each has told what was written into them. Collective;
        raises RankFailure for other settings than this rank's."""
        for store in self.stores:
            store.watch()
        board, settings = self.board, {"learning rate": lr, "weight decay": weight_decay}
        # In two places in turn, as a barrier's kind: the first rank may be at its next step already.
        place = Board.SETTING + len(settings) * (board.get(Board.BARRIER, self.topology.place) % 2)
        for i, setting in enumerate(settings.values()):
            board.put(place + i, struct.unpack("q", struct.pack("d", setting))[0])
        board.barrier(_STEP, "the optimizer's step")
        for i, (name, setting) in enumerate(settings.items()):
            first = struct.unpack("d", struct.pack("q", board.get(place + i, 0)))[0]
            if first != setting:
                raise RankFailure(
                    f"rank {self.topology.rank} steps at a {name} of {setting}, the first rank of its node at {first}: "
                    "give every rank the same schedule"
                )

    def before_and_after_loading(self) -> None:
        """Return when every rank has brought its rows up to date, and again when every rank has loaded an optimizer's
        state. Collective."""
        self.board.barrier(_LOAD, "loading the optimizer's state")


@torch.no_grad()
@engine
def join(stores: "Sequence[NeuronStore]", settings: dict[str, Any], moments: torch.dtype, counted: bool) -> Team | None:
    """Share stores among the ranks that torch.distributed has started. None in a process alone, which takes back what
    it shared while there were others.

    Collective over all ranks, with the optimizer's settings. Raises ValueError, the same on all ranks, for ranks that
    disagree, memory that is not there, and rows that are no host memory.
    """
    topology = here()
    if topology is None:
        for store in stores:
            if store.share is not None:
                store.share.leave(store)
        return None
    topology.agree(_about(stores, settings, moments, counted), "what they train")
    if any(store.config.placement == "device" for store in stores):
        raise ValueError("placement='device' keeps a set of rows on each device: with several ranks take 'host'")
    if any(store.rests for store in stores):
        raise ValueError("distinctive updates are for one process: leave distinctive out, or start one rank")
    names, wanted = [], [Array((Board.SLOTS + len(stores) * StoreShare.COUNTERS, topology.beside), torch.int64)]
    for number, store in enumerate(stores):
        for name, array in arrays(store, moments, counted).items():
            names.append((number, name))
            wanted.append(array)
    freed = sum(store.rows_R2D.nbytes for store in stores if store.share is None)
    shared = SharedMemory(topology, wanted, freed)
    board = Board(topology, shared, 0)
    tensors: list[dict[str, Tensor]] = [{} for _ in stores]
    for (number, name), tensor in zip(names, shared.tensors[1:], strict=True):
        tensors[number][name] = tensor
    for number, store in enumerate(stores):
        share = StoreShare(board, number, tensors[number])
        if topology.leads_node:
            share.tensors["rows"].copy_(store.rows_R2D)
            if "router" in share.tensors:
                share.tensors["router"].copy_(store.router_ND)
        # One after the other, so that what each rank had of a store is free before the next one is copied.
        board.barrier(_JOIN, "sharing rows")
        share.enter(store)
    team = Team(topology, stores, board)
    for store in stores:
        store.team = team
    return team


def _about(
    stores: "Sequence[NeuronStore]", settings: dict[str, Any], moments: torch.dtype, counted: bool
) -> dict[str, Any]:
    """What all ranks must have alike, by name."""
    about: dict[str, Any] = {"the number of layers": len(stores)}
    options = [{n: v for n, v in store.config.to_dict().items() if n not in _EACH_ITS_OWN} for store in stores]
    about |= {**options[0], "options of all layers": options}
    about["shapes"] = [tuple(store.rows_R2D.shape) for store in stores]
    about["what is trained"] = [name for name, p in stores[0].named_parameters() if p.requires_grad]
    about |= settings | {"moments": moments, "steps counted by row": counted}
    about["rows to start from"] = _sample(stores)
    return about


def _sample(stores: "Sequence[NeuronStore]") -> str:
    """A digest of some rows of every layer, and of its router: those of another seed or checkpoint are all others."""
    digest = hashlib.sha256()
    for store in stores:
        rows_R2D = store.rows_R2D
        some = rows_R2D[:: max(1, rows_R2D.shape[0] // _SAMPLED_ROWS)]
        for tensor in (some, *([store.router_ND] if store.trains_router else [])):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
