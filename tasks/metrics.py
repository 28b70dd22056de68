"""Scores of one generated answer against one document; each process_* is called by lm-eval per document.

Three readings of "exact match" stand side by side. released_contains is what the authors' released evaluation does
(mode "paper"): an answer string occurs anywhere in the output. contains asks for whole words. exact_match and f1
compare normal forms, which follow SQuAD's except where that makes different answers equal: a sign, a decimal point and
symbols count ("-5" is not "5", "1.5" not "15", "C++" not "C"), and nothing is no answer.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

_ARTICLES = ("a", "an", "the")
_SPELLINGS = ("<wide>", "<narrow>", "<noBreak>", "<compat>")
"""Unicode's other spellings of a character. <super>, <fraction> and others are left: a raised 2 after 5 is not 52."""
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff\u200e\u200f"))
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts, as Unicode names begin, that part no words with spaces or attach endings: each sign is taken for a word."""
_MEANING = "#%&@"
"""Punctuation by Unicode's categories that is read, not passed over."""
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[,\u00a0\u202f\u2009]\d{3})+(?!\d)")
_SIGN = r"(?<![\w)])-(?=[.\d$€£¥])"
_IN_A_NUMBER = re.compile(rf"{_SIGN}|(?<=\d)[^\w\s](?=\d)")
_SIGN_OR_RUN = re.compile(rf"{_SIGN}|(?<!\d)\d+(?:[^\w\s]\d+)+")
"""A sign, or numbers with one mark between each two: 1.5 is one number, 25.12.2020 are three."""
_HIDDEN = 0xF0000
"""Private characters from here on stand for punctuation that is kept while the rest is taken out."""
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\d)])-)?(?:[$€£¥]-?)?)"
    r"(?:(?<![\d/])(?:(?P<whole>\d+) )?(?P<over>\d+)/(?P<under>\d+)(?![\d/])"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?))"
)


# ---- one spelling ----


def fold(text: str) -> str:
    """text in one spelling: composed (NFC), wide characters and ligatures as plain ones, digits in ASCII, dashes as
    "-", numbers without thousands separators, no invisible characters."""
    text = "".join(map(_plain_digit, unicodedata.normalize("NFC", text).translate(_INVISIBLE)))
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = re.sub("[\u2014\u2015]", " - ", re.sub("[\u2010-\u2013\u2212]", "-", text))
    # Once more for a full-width separator, which is plain only now.
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), "".join(map(_plain, text)))
    return unicodedata.normalize("NFC", text)


def _plain_digit(c: str) -> str:
    return str(unicodedata.decimal(c)) if c.isdecimal() else c


def _plain(c: str) -> str:
    return unicodedata.normalize("NFKC", c) if unicodedata.decomposition(c).startswith(_SPELLINGS) else c


def normalise(text: str) -> str:
    """The form that exact_match and f1 compare: folded, lower case, single spaces, no articles before a word, no
    punctuation except inside numbers; where that leaves nothing, the folded text."""
    folded = _folded_numbers(text, True)
    hidden = _IN_A_NUMBER.sub(_hidden, folded)
    every = _shown("".join(c for c in hidden if not _passed_over(c))).split()
    kept = [word for i, word in enumerate(every) if word not in _ARTICLES or i + 1 == len(every)]
    return " ".join(kept or folded.split())


def words(text: str, lower: bool = False) -> list[str]:
    """The words and numbers of a text in order, without punctuation; symbols such as $ and % are words too."""
    parted: list[str] = []
    for c in _SIGN_OR_RUN.sub(_hidden, _folded_numbers(text, lower)):
        if _passed_over(c):
            parted.append(" ")
        elif c in "+#" and parted and (parted[-1].isalnum() or parted[-1] in "+#"):
            parted.append(c)  # C++, C#
        elif c in _MEANING or unicodedata.category(c)[0] == "S" or unicodedata.name(c, "").startswith(_NO_SPACES):
            parted.append(f" {c} ")
        else:
            parted.append(c)
    return _shown("".join(parted)).split()


def _folded_numbers(text: str, lower: bool) -> str:
    """Folded, with ".5" as "0.5" and "+5" as "5"."""
    text = fold(text)
    if lower:
        text = unicodedata.normalize("NFC", text.casefold())
    return re.sub(r"(?<![\w.])\.(?=\d)", "0.", re.sub(r"(?<![\w+])\+(?=\.?\d)", "", text))


def _passed_over(c: str) -> bool:
    return c in "`\u00b4" or (unicodedata.category(c)[0] == "P" and c not in _MEANING)


def _hidden(found: re.Match[str]) -> str:
    """A sign, or the point of a decimal number, as a private character."""
    if len(found[0]) == 1:
        return chr(_HIDDEN + ord(found[0])) if found[0] < chr(0x10000) else found[0]
    return found[0].replace(".", chr(_HIDDEN + ord("."))) if re.fullmatch(r"\d+\.\d+", found[0]) else found[0]


def _shown(text: str) -> str:
    return "".join(chr(ord(c) - _HIDDEN) if _HIDDEN <= ord(c) < _HIDDEN + 0x10000 else c for c in text)


# ---- containment, exact match, F1 ----


def contains(output: str, answers: Iterable[str], lower: bool = False) -> float:
    """1 if the words of any answer stand in the output, in order and side by side; case counts unless lower.

    An answer of punctuation alone must occur as it is; an empty one is in nothing.
    """
    found = f"\0{chr(0).join(words(output, lower))}\0"

    def stands(answer: str) -> bool:
        wanted = words(answer, lower)
        if wanted:
            return f"\0{chr(0).join(wanted)}\0" in found
        return bool(plain := fold(answer).strip()) and plain in fold(output)

    return float(any(map(stands, answers)))


def released_contains(output: str, answers: Iterable[str], lower: bool = False) -> float:
    """1 if any answer occurs in the output as a plain substring, so "art" is found in "party" and "" in anything.

    The released code compares case-sensitively on NQ and lower-cased on SQuAD.
    """
    if lower:
        output, answers = output.lower(), [a.lower() for a in answers]
    return float(any(answer in output for answer in answers))


def exact_match(output: str, answers: Iterable[str]) -> float:
    """1 if the output equals any answer in normal form."""
    got = normalise(output)
    return float(any(got == normalise(a) for a in answers))


def f1(output: str, answers: Iterable[str]) -> float:
    """Best token F1 over the answers, in normal form."""
    ours = normalise(output).split()

    def score(answer: str) -> float:
        theirs = normalise(answer).split()
        if not ours or not theirs:
            return float(ours == theirs)
        common = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * common / (len(ours) + len(theirs))

    return max((score(a) for a in answers), default=0.0)


# ---- sets of APIs ----


def api_set(text: str, separator: str) -> set[str]:
    """The APIs named in an output or target, composed (NFC), white space folded, empty entries dropped."""
    return {" ".join(part.split()) for part in unicodedata.normalize("NFC", text).split(separator)} - {""}


def iou(output: str, answers: Sequence[str], separator: str) -> float:
    """Size of the intersection over that of the union of the two API sets; order and repeats do not count."""
    ours, theirs = api_set(output, separator), set().union(*(api_set(a, separator) for a in answers))
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


# ---- final numbers ----


def final_number(text: str) -> Decimal | None:
    """The last number written, a fraction such as 1 1/2 and 1e3 among them; None if there is none, or one that is too
    large for any number."""
    every = list(_NUMBER.finditer(fold(text)))
    if not every:
        return None
    found = every[-1]
    if not found["number"] and not found["under"].strip("0"):
        return None
    try:
        if found["number"]:
            value = Decimal(found["number"])
        else:
            value = Decimal(found["whole"] or 0) + Decimal(found["over"]) / Decimal(found["under"])
    except ArithmeticError:  # an exponent of a model's own
        return None
    return value.copy_negate() if "-" in found["sign"] else value


def number_match(output: str, answers: Iterable[str]) -> float:
    """1 if the output's final number equals an answer's."""
    got = final_number(output)
    return float(got is not None and any(got == final_number(a) for a in answers))


# ---- per document ----


def process_nq(doc: dict, results: list[str]) -> dict[str, float]:
    """Case-sensitive containment, exact match, F1."""
    return _qa(doc, results[0], lower=False)


def process_squad(doc: dict, results: list[str]) -> dict[str, float]:
    """Containment whatever the case, exact match, F1."""
    return _qa(doc, results[0], lower=True)


def _qa(doc: dict, output: str, lower: bool, inside: Callable[..., float] = contains) -> dict[str, float]:
    answers = doc["answers"]
    return {
        "contains": inside(output, answers, lower),
        "exact_match": exact_match(output, answers),
        "f1": f1(output, answers),
    }


def process_tools(doc: dict, results: list[str]) -> dict[str, float]:
    """IoU of comma-separated API names, and whether the sets are equal."""
    return _apis(doc, results[0], ",")


def process_toolbench(doc: dict, results: list[str]) -> dict[str, float]:
    """IoU of semicolon-separated "tool : api" names, and whether the sets are equal."""
    return _apis(doc, results[0], ";")


def _apis(doc: dict, output: str, separator: str) -> dict[str, float]:
    score = iou(output, doc["answers"], separator)
    return {"iou": score, "exact_match": float(score == 1.0)}


def process_number(doc: dict, results: list[str]) -> dict[str, float]:
    """Final-number accuracy."""
    return {"accuracy": number_match(results[0], doc["answers"])}


def as_released(process: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """A process_* with the released evaluation's containment in place of ours (mode "paper")."""
    if process.__name__ not in ("process_nq", "process_squad"):
        return process
    lower = process.__name__ == "process_squad"
    return lambda doc, results: _qa(doc, results[0], lower, released_contains)
