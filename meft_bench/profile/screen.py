"""What `meft-bench profile` puts on the screen: a line for every row as it is known, then the answer. No torch here."""

from collections.abc import Iterator, Mapping
from typing import Any

from meft_bench.profile import best

GIB = 2**30
_NAME = 62


class Rows:
    """Prints rows of one profile: a heading before the first, a line for each. host_room: bytes of the host."""

    def __init__(self, about: str, host_room: int) -> None:
        self.host_room = host_room
        self.begin(about)

    def begin(self, about: str) -> None:
        """Another heading before the next row."""
        self.about, self.started = about, False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Print one row."""
        if not self.started:
            print(self.about)
            head = f"{'method':<{_NAME}}{'R':>6} {'ckpt':>4}{'U/R':>6}{'GiB':>7}{'host':>7} {'fits':>4}"
            print(f"{head}  tokens/s at accumulation", flush=True)
            self.started = True
        print(row_line(row, self.host_room), flush=True)


def row_line(row: Mapping[str, Any], host_room: int) -> str:
    """One row: U/R, GiB on the device and on the host, whether both fit, and the speed by micro-batches accumulated."""
    union = row.get("union")
    title = row["title"] + _kind(union)
    size = row["neurons"] or "-"
    start = f"{title:<{_NAME}}{size:>6} {'yes' if row['checkpointing'] else 'no':>4}"
    if row["state"] != "ok":
        return f"{start}  not run: {row['reason']}"
    share = f"{union['union_share']:.2f}" if union else "-"
    speeds = row["time"]["tokens_per_s_by_accumulation"]
    told = ", ".join(f"{speeds[a]:,.0f} at {a}" for a in sorted(speeds, key=int))
    one, more = (_held(best.memory_at(row, a), host_room) for a in (1, 2))
    if more != one:
        told += f"; from 2 on {more[0]} GiB"
        told += f", host {more[1]}" if more[1] != one[1] else ""
        told += "" if more[2] == "yes" else ", which does not fit"
    return f"{start}{share:>6}{one[0]:>7}{one[1]:>7} {one[2]:>4}  {told}"


def _held(memory: Mapping[str, Any], host_room: int) -> tuple[str, str, str]:
    """GiB on the device, GiB on the host, whether card and host hold them."""
    device, host = (f"{memory[name] / GIB:.1f}" for name in ("device_total_bytes", "host_peak_bytes"))
    return device, host, "yes" if memory["fits"] and memory["host_peak_bytes"] <= host_room else "no"


def answer_lines(profile: Mapping[str, Any]) -> Iterator[str]:
    """The best that fits: for the profiled card at every accumulation, for the other classes a line each."""
    sizes = sorted({r["neurons"] for r in profile["rows"] if r["neurons"]} & set(profile["settings"]["asked"]))
    for neurons in sizes:
        yield (
            f"The best that fits card and host at R = {neurons:,} (x resident: over the speed of a Parallel Adapter of "
            "this size that is all on the card, whether it fits or not):"
        )
        for card in best.cards_of(profile):
            found = best.points(profile, card)
            for a in best.accumulations_on(profile, card):
                yield f"  {card}, accumulation {a}: {_told(best.answer(found, card, neurons, a))}"


def _told(answer: best.Answer) -> str:
    if answer.fastest is None:
        return "nothing of this size fits"
    parts = [f"fastest: {_speed(answer, answer.fastest)}"]
    if answer.exact is not None and answer.exact is not answer.fastest:
        parts.append(f"with exact AdamW on an unquantised base: {_speed(answer, answer.exact)}")
    if answer.ours is None:
        parts += ["MEFT does not fit"] if answer.ours_ran else []  # else it was not asked for, or does not attach
    elif answer.ours not in (answer.fastest, answer.exact):
        parts.append(f"MEFT at best: {_speed(answer, answer.ours)}")
    if answer.largest is not None:
        found = answer.largest
        parts.append(
            f"largest at {answer.floor:,.0f} tokens/s or more: {found.point.name}, about "
            f"{found.trainable / 1e6:,.0f} M parameters ({found.ended})"
        )
    elif answer.floor:
        parts.append(f"nothing reaches {answer.floor:,.0f} tokens/s")
    return "; ".join(parts)


def _speed(answer: best.Answer, point: best.Point) -> str:
    share = answer.share(point)
    beside = "" if share is None else f" ({share:.2f} x resident)"
    return f"{point.name}, {point.tokens_per_s[answer.accumulation]:,.0f} tokens/s{beside}"


def _kind(union: Mapping[str, Any] | None) -> str:
    words = best.union_words(union)
    return f" (U {words})" if words else ""


def longer_lines(profile: Mapping[str, Any]) -> Iterator[str]:
    """The rows of larger micro-batches; with checkpointing where they do not fit without."""
    room = profile["settings"]["host_memory_bytes"]
    for row in profile.get("longer", ()):
        yield f"{row['batch']} x {row['seq']} tokens: {row_line(row, room)}"


def largest_lines(profile: Mapping[str, Any]) -> Iterator[str]:
    """The largest R of every method that was searched for."""
    if profile["largest"]:
        most = max(profile["settings"]["accumulations"])
        yield f"The largest R that fits card and host in steps of {most} micro-batch{'es' * (most > 1)}:"
    for entry in profile["largest"]:
        title = entry["title"] + _kind(entry.get("union") or {"evidence": entry["union_evidence"]})
        saved = "yes" if entry["checkpointing"] else "no"
        ran = entry["state"] == "ok"
        said = f"{entry['neurons']:>6}  {best.ended(entry['limit'])}" if ran else f"  {entry['reason']}"
        yield f"{title:<{_NAME}}{said}, checkpointing {saved}"
