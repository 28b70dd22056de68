"""Scores of one generated answer against one document; each process_* is called by lm-eval per document.

Two readings of "exact match" stand side by side: containment as the authors' released evaluation does it (an answer
string occurs anywhere in the output), and the field's normalised exact match and F1.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def contains(output: str, answers: Iterable[str], lower: bool = False) -> float:
    """1 if any answer occurs in the output as a plain substring, so "art" is found in "party" and "" in anything.

    The released code compares case-sensitively on NQ and lower-cased on SQuAD.
    """
    if lower:
        output, answers = output.lower(), [a.lower() for a in answers]
    return float(any(answer in output for answer in answers))


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(output: str, answers: Iterable[str]) -> float:
    """1 if the output equals any answer in normal form."""
    return float(any(normalise(output) == normalise(a) for a in answers))


def f1(output: str, answers: Iterable[str]) -> float:
    """Best token F1 over the answers, in normal form."""

    def score(answer: str) -> float:
        ours, theirs = normalise(output).split(), normalise(answer).split()
        if not ours or not theirs:
            return float(ours == theirs)
        common = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * common / (len(ours) + len(theirs))

    return max((score(a) for a in answers), default=0.0)


def api_set(text: str, separator: str) -> set[str]:
    """The APIs named in an output or target, white space folded, empty entries dropped."""
    return {" ".join(part.split()) for part in text.split(separator)} - {""}


def iou(output: str, answers: Sequence[str], separator: str) -> float:
    """Size of the intersection over that of the union of the two API sets; order and repeats do not count."""
    ours, theirs = api_set(output, separator), {" ".join(a.split()) for a in answers}
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def final_number(text: str) -> float | None:
    """The last number written, thousands separators and dollar signs removed; None if there is none."""
    found = _NUMBER.findall(text)
    return float(re.sub("[,$]", "", found[-1])) if found else None


def number_match(output: str, answers: Iterable[str]) -> float:
    """1 if the output's final number equals an answer's."""
    got = final_number(output)
    return float(got is not None and any(got == final_number(a) for a in answers))


def process_nq(doc: dict, results: list[str]) -> dict[str, float]:
    """Case-sensitive containment, exact match, F1."""
    return _qa(doc, results[0], lower=False)


def process_squad(doc: dict, results: list[str]) -> dict[str, float]:
    """Lower-cased containment, exact match, F1."""
    return _qa(doc, results[0], lower=True)


def _qa(doc: dict, output: str, lower: bool) -> dict[str, float]:
    answers = doc["answers"]
    return {
        "contains": contains(output, answers, lower),
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
