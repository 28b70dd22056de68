"""Sums over nodes: what each node has added up goes to the owner of each row, and the sum comes back to all.

Only rows that some rank touched travel. The rows of a node are divided among its ranks (row modulo ranks of a node),
and each rank talks to those with its place on the other nodes, among which its rows are divided again. So a node sends
each touched row to its owner once at most, and what it owns to the others: at most 2 x touched rows x width x bytes of
a number x (nodes - 1) / nodes, on average over the nodes. The owner adds in the order of the nodes, so the sums are the
same bits on all of them, and each node makes the optimizer's steps for its own copy of the rows from them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meft_bench.meft.engine import kernels
from meft_bench.meft.engine.topology import RankFailure, Topology, collective


class Part(NamedTuple):
    """One matrix of this node to be summed."""

    name: str
    """What its bytes are counted as."""
    sums_RX: Tensor
    """fp32, this node's sums; those of filled rows become the sums over all nodes."""
    filled_R: Tensor
    """bool: rows that this node has touched, then those that any node has."""
    squares_R: Tensor | None
    """fp64: becomes the squares of each filled row, where wanted."""
    narrow: bool
    """Numbers cross in bf16."""


class Exchange:
    """This rank's share of the sums over nodes. bytes: what it has sent to other nodes, by name of the part, and the
    lists of rows ("rows")."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.bytes = topology, Counter[str]()

    @torch.no_grad()
    def sum(self, parts: Sequence[Part]) -> None:
        """Sum this rank's rows of all parts over the nodes. All ranks of all nodes call it with parts alike. Raises
        RankFailure for lists of rows that cannot be."""
        topology = self.topology
        owned = [self._owned(part) for part in parts]
        mine = [[rows[part.filled_R[rows]] for rows in by_node] for part, by_node in zip(parts, owned, strict=True)]
        theirs = self._lists(mine, [[by_node[topology.node]] * topology.nodes for by_node in owned])
        results = []
        for part, sent, came in zip(parts, mine, theirs, strict=True):
            results.append(self._add(part, sent, came))
        # Then the other way round: what this rank owns, now summed, to all; what others own from them.
        given = [[rows] * topology.nodes for rows, _ in results]
        taken = self._lists(given, owned)
        for part, (rows, sums), come in zip(parts, results, taken, strict=True):
            self._spread(part, rows, sums, come)

    def _owned(self, part: Part) -> list[Tensor]:
        """By node, the rows at this place that it owns, ascending."""
        topology, rows = self.topology, part.filled_R.shape[0]
        step = topology.beside * topology.nodes
        return [torch.arange(topology.place + node * topology.beside, rows, step) for node in range(topology.nodes)]

    def _lists(self, sent: list[list[Tensor]], allowed: list[list[Tensor]]) -> list[list[Tensor]]:
        """Exchange lists of rows, one for each part and node. No more is taken than the rows that are allowed."""
        nodes = self.topology.nodes
        counts = torch.tensor([[rows.numel() for rows in by_node] for by_node in sent]).T.contiguous()
        came = torch.empty_like(counts)
        with collective("how many rows each node has touched"):
            dist.all_to_all_single(came, counts, group=self.topology.across)
        most = torch.tensor([[rows.numel() for rows in by_node] for by_node in allowed]).T
        if bool(((came < 0) | (came > most)).any()):
            raise RankFailure("another node announced more rows than there are: ranks of one version only")
        flat = torch.cat([by_node[node] for node in range(nodes) for by_node in sent]).int()
        lists = self._send(flat, counts.sum(1).tolist(), came.sum(1).tolist(), "rows").long()
        found = lists.split(came.flatten().tolist())
        made = [[found[node * len(sent) + number] for node in range(nodes)] for number in range(len(sent))]
        for by_node, fitting in zip(made, allowed, strict=True):
            for rows, allowed_rows in zip(by_node, fitting, strict=True):
                if rows.numel() and not (bool((rows.diff() > 0).all()) and bool(torch.isin(rows, allowed_rows).all())):
                    raise RankFailure("another node sent rows that it cannot have: ranks of one version only")
        return made

    def _add(self, part: Part, sent: list[Tensor], came: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(the rows this rank owns and any node touched, their sums [O, X] as the others will have them)."""
        node = self.topology.node
        away = [rows if number != node else rows[:0] for number, rows in enumerate(sent)]
        wire = self._wire(part, part.sums_RX[torch.cat(away)])
        lengths = [rows.numel() if number != node else 0 for number, rows in enumerate(came)]
        grads = self._send(wire, [rows.numel() for rows in away], lengths, part.name).split(lengths)
        rows = torch.cat(came).unique()
        sums_OX = torch.zeros(rows.numel(), part.sums_RX.shape[1])
        filled_O, squares_O = torch.zeros(rows.numel(), dtype=torch.bool), torch.zeros(rows.numel()).double()
        for number, listed in enumerate(came):
            if listed.numel():
                places = torch.searchsorted(rows, listed)
                source = part.sums_RX[listed] if number == node else grads[number]
                kernels.accumulate(sums_OX, places, source, filled_O, squares_O)
                filled_O[places] = True
        return rows, self._wire(part, sums_OX)

    def _spread(self, part: Part, rows: Tensor, sums: Tensor, come: list[Tensor]) -> None:
        """Give the sums of this rank's rows to the other nodes, and put theirs and ours in place."""
        node, others = self.topology.node, self.topology.nodes - 1
        lengths = [listed.numel() if number != node else 0 for number, listed in enumerate(come)]
        given = [rows.numel() if number != node else 0 for number in range(self.topology.nodes)]
        came = self._send(sums.repeat(others, 1), given, lengths, part.name).split(lengths)
        for number, listed in enumerate(come):
            new = (sums if number == node else came[number]).float()
            part.sums_RX[listed] = new
            part.filled_R[listed] = True
            if part.squares_R is not None:
                part.squares_R[listed] = kernels.squares(new)

    def _wire(self, part: Part, numbers: Tensor) -> Tensor:
        return numbers.bfloat16() if part.narrow else numbers

    def _send(self, flat: Tensor, given: list[int], taken: list[int], name: str) -> Tensor:
        """all_to_all of rows: given[n] of them to node n, taken[n] from it."""
        topology, width = self.topology, flat[:1].numel() if flat.dim() == 1 else flat.shape[1]
        came = flat.new_empty((sum(taken), *flat.shape[1:]))
        self.bytes[name] += (sum(given) - given[topology.node]) * (1 if flat.dim() == 1 else width) * flat.itemsize
        with collective(f"the sum of gradients over nodes ({name})"):
            # As bytes: gloo knows fewer number formats than torch.
            dist.all_to_all_single(
                came.view(torch.uint8).flatten(), flat.contiguous().view(torch.uint8).flatten(),
                _bytes(taken, flat), _bytes(given, flat), group=topology.across,
            )  # fmt: skip
        return came


def _bytes(rows: list[int], like: Tensor) -> list[int]:
    each = like.itemsize * (like.shape[1] if like.dim() > 1 else 1)
    return [count * each for count in rows]
