"""What a profile covers: every variant at every size, with and without activation checkpointing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meft_bench.profile.selection import assumed_union, logged_union
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.trained.use import trained_union
from meft_bench.profile.variants import SIZES, VARIANTS, Variant, size_options

LONGER = ((4, 512), (8, 512))
"""Sequences and their tokens of the larger micro-batches of a full profile: T = 2048 and 4096."""
PAPER_SHARE = 0.259
"""U / R that the paper's 0.56 M implies when gradients are counted: (0.56 x 2 R - T) / 4 R at R = 6144, T = 512."""
PAPER_REASON = "U/R implied by the paper's 0.56 M, gradients counted"


@dataclass(frozen=True, kw_only=True)
class UnionSource:
    """Where U comes from: a logged selection, and a share that is assumed."""

    log: dict[str, Any] | None
    """None: there is no log, and only the assumed share is used."""
    share: float = PAPER_SHARE
    why: str = PAPER_REASON
    trained: dict[str, Any] | None = None
    """A trained model's log, which takes the place of log."""

    def unions(self, variant: Variant, model: str, tokens: int, neurons: int) -> Iterator[Union | None]:
        """Every U to profile the variant with; a single None for a variant that moves no union."""
        if not variant.needs_union:
            yield None
            return
        key_experts = variant.options.get("key_experts", True)
        if self.trained is not None:
            kept = size_options(variant, neurons, None)["kept"]
            yield trained_union(self.trained, tokens, neurons, kept, key_experts)
        elif self.log is not None and (found := logged_union(self.log, model, tokens, neurons, key_experts)):
            yield found
        yield assumed_union(self.share, neurons, self.why)


def matrix(
    model: str,
    source: UnionSource,
    batch: int,
    seq: int,
    accumulation: int,
    sizes: Iterable[int] = SIZES,
    ranks: Sequence[int] = (),
) -> list[ProfileSpec]:
    """Every spec of a profile, variants in order, small sizes first. ranks: LoRA's own sizes, in place of those that
    R gives."""
    specs = []
    for variant in VARIANTS.values():
        for neurons, rank in _sizes(variant, sizes, ranks):
            for union in source.unions(variant, model, batch * seq, neurons):
                for checkpointing in (False, True) if not variant.untrained else (False,):
                    specs.append(
                        ProfileSpec(
                            model=model,
                            variant=variant.name,
                            neurons=neurons,
                            checkpointing=checkpointing,
                            batch=batch,
                            seq=seq,
                            accumulation=accumulation,
                            union=union,
                            rank=rank,
                        )
                    )
    return specs


def _sizes(variant: Variant, sizes: Iterable[int], ranks: Sequence[int]) -> list[tuple[int, int | None]]:
    """(R, rank) of every line of a variant."""
    if variant.option == "rank" and ranks:
        return [(1, rank) for rank in ranks]
    return [(neurons, None) for neurons in (sizes if variant.option is not None else (1,))]


def at_more_tokens(specs: Iterable[ProfileSpec], batch: int, seq: int) -> list[ProfileSpec]:
    """The specs with micro-batches of batch x seq tokens: one for each method, size and checkpointing, from the logged
    U where there is one."""
    chosen: dict[tuple[Any, ...], ProfileSpec] = {}
    for spec in specs:
        chosen.setdefault((spec.variant, spec.neurons, spec.rank, spec.checkpointing), spec)
    return [replace(s, batch=batch, seq=seq, union=_grown(s, batch * seq)) for s in chosen.values()]


def _grown(spec: ProfileSpec, tokens: int) -> Union | None:
    """U of so many tokens: of as many micro-batches where they are logged, else as if every spec.tokens of them drew
    their neurons independently, and so assumed."""
    if spec.union is None:
        return None
    draws = tokens / spec.tokens
    if draws in dict(spec.union.window):
        window = tuple((int(a / draws), rows) for a, rows in spec.union.window if a % draws == 0)
        source = f"{spec.union.source}; {draws:g} of them as one of {tokens} tokens"
        return replace(spec.union, rows=window[0][1], window=window, source=source)
    rows = spec.neurons * (1 - (1 - spec.union.rows / spec.neurons) ** draws)
    source = f"{spec.union.source}; {tokens} tokens as {draws:g} independent draws"
    return Union(rows=round(rows), source=source, evidence="assumed")
