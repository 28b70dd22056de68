"""What a reader decides by: the best that fits each card, MEFT's speed beside a resident adapter's, and where MEFT is
not the answer. Every line is made from rows."""

from collections.abc import Iterator, Sequence

from meft_bench.profile import best
from meft_bench.profile.best import Answer, Point
from meft_bench.report.records.profiles import COMMAND, Profile, card_of, stale_note
from meft_bench.report.tables.profile import GIB, amount
from meft_bench.report.text import Table, lowered, table

_NOT_RUN = f"Not run: `{COMMAND}`."
_LEVELS = (1, 8, 32)
"""Micro-batches of a step that the page speaks of, where a profile has them."""
_AGREED = (
    "Simulated unless a profile says otherwise. It fits means: card and host memory hold a step of that accumulation. "
    "Where U was logged, rows with the assumed U do not compete."
)


def best_table(profiles: Sequence[Profile]) -> Table:
    """For every card and accumulation: the fastest that fits at the stated R, and the largest at a resident adapter's
    speed."""
    header = ("Model", "Card", "R", "Accumulation", "Fastest", "Tokens/s", "Exact, fastest", "Exact, tokens/s",
              "MEFT, fastest", "MEFT, tokens/s", "MEFT / resident", "At least, tokens/s", "Largest at that speed",
              "Its parameters, millions", "What ends it")  # fmt: skip
    lines = [[p.model, card, *_best_cells(a)] for p, card, a in _answers(profiles)]
    told = (
        f"The best that fits each card. {_AGREED} Exact: dense AdamW, fp32 moments, a base that is not quantised. "
        "MEFT / resident: over the speed of a Parallel Adapter of the same R that is all on the card, whether it fits "
        f"or not. The largest is asked for at no less than {best.SPEED_SHARE:g} of that speed; between profiled sizes "
        "its parameters follow a straight line, so they are about right. Cards other than the profiled one: the same "
        "operations with that card's rates."
    )
    return table("profile_best", lowered(header), lines, left=3, before=[stale_note(profiles), told], instead=_NOT_RUN)


def speed_table(profiles: Sequence[Profile]) -> Table:
    """MEFT's speed over the resident adapter's of the same R, by variant and accumulation."""
    counts = sorted({a for p in profiles for a in p.settings["accumulations"]})
    header = ["Model", "Card", "Method", "Checkpointing", "R", "U/R", "Device GiB", "Fits", "Host GiB",
              *(f"Accumulation {a}" for a in counts)]  # fmt: skip
    lines = [line for p in profiles for line in _speed_lines(p, card_of(p, profiles), counts)]
    told = (
        "Tokens a second of every variant of MEFT over those of the resident Parallel Adapter of the same R, both "
        "without checkpointing unless a line says otherwise, at each number of accumulated micro-batches; the "
        "resident one is taken as it would be if it fitted. Fits: card and host memory hold a step of the most "
        "micro-batches, of which the GiB are."
    )
    return table("profile_speed", lowered(header), lines, left=4, before=[told], instead=_NOT_RUN)


def not_the_answer(profiles: Sequence[Profile]) -> Table:
    """Every card and size at which, at some accumulation, an adapter with its optimizer or more on the host is faster
    than MEFT under the same memory."""
    counts = sorted({a for p in profiles for a in p.settings["accumulations"]})
    places = [(p, _of_profile(p, n)) for p in profiles for n in p.neurons]
    answers = [a for _, own in places for a in own.values() if a.ours is not None and a.offloaded is not None]
    behind = [a for a in answers if _ratio(a) < 1]
    header = ["Model", "Card", "R", "Faster than MEFT", "Fastest of all that fits",
              *(f"MEFT / it, accumulation {a}" for a in counts)]  # fmt: skip
    lines = [
        _behind(p, card_of(p, profiles), own, counts) for p, own in places if any(a in behind for a in own.values())
    ]
    told = (
        f"Where MEFT is not the answer: at {len(behind)} of {len(answers)} places (card, R, accumulation) where "
        "both fit, a Parallel Adapter with its optimizer, or all of it, on the host trains faster than any MEFT. The "
        "numbers are MEFT's speed over that of the fastest such adapter. What else fits may be faster still: the "
        f"column before them names the fastest. {_AGREED}"
    )
    return table(
        "profile_not_meft", lowered(header), lines, left=5, before=[told],
        instead=f"{told}\n\nNo such place." if answers else _NOT_RUN,
    )  # fmt: skip


def _behind(profile: Profile, card: str, answers: dict[int, Answer], counts: Sequence[int]) -> list[str]:
    own = [a for a in answers.values() if a.ours is not None and a.offloaded is not None]
    rivals = dict.fromkeys(a.offloaded.name for a in own if a.offloaded is not None and _ratio(a) < 1)
    fastest = dict.fromkeys(a.fastest.name for a in own if a.fastest is not None)
    ratios = {a.accumulation: f"{_ratio(a):.2f}" for a in own}
    return [profile.model, card, f"{own[0].neurons:,}", "; ".join(rivals), "; ".join(fastest),
            *(ratios.get(a, "none") for a in counts)]  # fmt: skip


def _ratio(answer: Answer) -> float:
    """MEFT's speed over that of the fastest adapter that is in part on the host."""
    assert answer.ours is not None and answer.offloaded is not None
    return answer.ours.tokens_per_s[answer.accumulation] / answer.offloaded.tokens_per_s[answer.accumulation]


def _answers(profiles: Sequence[Profile]) -> Iterator[tuple[Profile, str, Answer]]:
    """(profile, what the card is called, answer) at the stated R: the usual accumulations on the profiled card, one on
    the others that have no profile of their own."""
    told = {(p.model, p.card) for p in profiles}
    for p in profiles:
        counts = p.settings["accumulations"]
        for card in p.cards if p.stated is not None else ():
            if card != p.card and (p.model, card) in told:
                continue
            told.add((p.model, card))
            levels = [a for a in _LEVELS if a in counts] or list(counts)
            chosen = levels if card == p.card else [best.stated_accumulation(counts)]
            found = p.points(card)
            name = card_of(p, profiles) if card == p.card else card
            yield from ((p, name, best.answer(found, card, p.stated or 0, a)) for a in chosen)


def _of_profile(profile: Profile, neurons: int) -> dict[int, Answer]:
    found = profile.points(profile.card)
    return {a: best.answer(found, profile.card, neurons, a) for a in profile.settings["accumulations"]}


def _best_cells(answer: Answer) -> list[str]:
    share, most = answer.share(answer.ours), answer.largest
    return [
        f"{answer.neurons:,}",
        str(answer.accumulation),
        *_named(answer, answer.fastest),
        *_named(answer, answer.exact),
        *_named(answer, answer.ours),
        "none" if share is None else f"{share:.2f}",
        f"{answer.floor:,.0f}" if answer.floor else "none",
        *(("none", "none", "none") if most is None else (most.point.name, f"{most.trainable / 1e6:,.0f}", most.limit)),
    ]


def _named(answer: Answer, point: Point | None) -> tuple[str, str]:
    return ("none", "none") if point is None else (point.name, f"{point.tokens_per_s[answer.accumulation]:,.0f}")


def _speed_lines(profile: Profile, card: str, counts: Sequence[int]) -> Iterator[list[str]]:
    """At the stated R and the next larger one: without checkpointing, or with it where only that fits."""
    larger = [n for n in profile.neurons if n > (profile.stated or 0)]
    found, most = profile.points(profile.card, both=True), max(profile.settings["accumulations"])
    for neurons in [n for n in (profile.stated, *larger[:1]) if n is not None]:
        here = [p for p in found if p.neurons == neurons]
        resident = next((p for p in here if p.variant == best.RESIDENT and not p.checkpointing), None)
        ours = [p for p in here if p.family == best.OURS]
        for series in dict.fromkeys((p.variant, p.union) for p in ours):
            own = sorted((p for p in ours if (p.variant, p.union) == series), key=lambda p: p.checkpointing)
            point = next((p for p in own if p.fits(most)), own[0])
            yield [
                profile.model,
                card,
                point.title,
                "yes" if point.checkpointing else "no",
                f"{neurons:,}",
                "none" if point.union_share is None else f"{point.union_share:.2f}",
                amount(point.device_bytes[most], GIB, 1),
                "yes" if point.fits(most) else "no",
                amount(point.host_bytes[most], GIB, 1),
                *(_share(point, resident, a) for a in counts),
            ]


def _share(point: Point, resident: Point | None, accumulation: int) -> str:
    if resident is None or accumulation not in point.tokens_per_s.keys() & resident.tokens_per_s.keys():
        return "none"
    return f"{point.tokens_per_s[accumulation] / resident.tokens_per_s[accumulation]:.2f}"
