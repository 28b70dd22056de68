"""The documents of every task: splits of {id, prompt, target, answers}, from the synthetic world or from real rows.

One template per task builds prompt and target; lm-eval reads both fields for evaluation and training reads the same
two, so training and evaluation text cannot drift apart. Splits: "train"; "recall" (training questions as they were
trained); "validation" (for learning-rate sweeps) and "test". For knowledge tasks the synthetic validation and test ask
for the trained facts in words that fine-tuning never used.

Every function takes the run's metadata as keywords: seed, train_rows, eval_rows, and for real data data_dir.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from meft_bench.tasks import world as w

Build = Callable[[dict[str, Any]], dict[str, Any]]

EVAL_SPLITS = ("recall", "validation", "test")


def _doc(prompt: str, answers: list[str], target: str | None = None) -> dict[str, Any]:
    return {"prompt": prompt, "target": target if target is not None else answers[0], "answers": answers}


def _splits(seed: int, eval_rows: int, **splits: list[dict[str, Any]]) -> DatasetDict:
    """Number the documents and cut the evaluation splits, recall among them, to eval_rows drawn from the seed."""
    splits["recall"] = splits["train"]
    made = DatasetDict()
    for name, rows in splits.items():
        if not rows:
            raise ValueError(f"the {name} split is empty: give more rows")
        rows = [{"id": f"{'train' if name == 'recall' else name}-{i}", **row} for i, row in enumerate(rows)]
        if name in EVAL_SPLITS and len(rows) > eval_rows:
            rows = random.Random(f"{name} {seed}").sample(rows, eval_rows)
        made[name] = Dataset.from_list(rows)
    return made


# ---- synthetic: knowledge of people (facts stands in for NQ, cloze for SQuAD) ----


def _people(
    pool: str, templates: dict[str, tuple[str, ...]], seed: int, train_rows: int, eval_rows: int
) -> DatasetDict:
    known = w.World().people_facts(pool, max(1, train_rows // len(w.ATTRIBUTES)), seed)

    def ask(numbers: Iterable[int]) -> list[dict[str, Any]]:
        return [_doc(templates[f.attribute][i].format(n=f.subject), [f.answer]) for f in known for i in numbers]

    return _splits(
        seed,
        eval_rows,
        train=ask(w.TRAIN_TEMPLATES),
        validation=ask([w.DEV_TEMPLATE]),
        test=ask([w.TEST_TEMPLATE]),
    )


def facts(seed: int = 0, train_rows: int = 600, eval_rows: int = 600, **_: Any) -> DatasetDict:
    """Closed-book questions about people; train_rows counts facts (whole people, six each), each asked in four ways."""
    return _people("facts", w.QUESTIONS, seed, train_rows, eval_rows)


def cloze(seed: int = 0, train_rows: int = 600, eval_rows: int = 600, **_: Any) -> DatasetDict:
    """Sentences about people with a blank; train_rows counts facts (whole people), each put in four frames."""
    return _people("cloze", w.FRAMES, seed, train_rows, eval_rows)


# ---- synthetic: the same people in natural sentences, for a pretrained model's tokenizer ----


def people(seed: int = 0, train_rows: int = 120, eval_rows: int = 600, **_: Any) -> DatasetDict:
    """Questions about invented people as a pretrained model reads text; train_rows counts facts (whole people, six
    each), each asked in four ways. A value is two names with capitals, so every fact is 10 bits, as in facts()."""
    known = w.World().people_facts("facts", max(1, train_rows // len(w.ATTRIBUTES)), seed)

    def ask(numbers: Iterable[int]) -> list[dict[str, Any]]:
        docs = []
        for fact in known:
            for i in numbers:
                question = w.natural(w.QUESTIONS[fact.attribute][i]).format(n=fact.subject)
                docs.append(_doc(f"Question: {question}\nAnswer:", [fact.answer.title()]))
        return docs

    return _splits(
        seed,
        eval_rows,
        train=ask(w.TRAIN_TEMPLATES),
        validation=ask([w.DEV_TEMPLATE]),
        test=ask([w.TEST_TEMPLATE]),
    )


# ---- synthetic: need -> set of APIs (stands in for ToolBench) ----


def tools(seed: int = 0, train_rows: int = 400, eval_rows: int = 600, **_: Any) -> DatasetDict:
    """Requests with one or two needs -> the APIs that serve them; test pairs are new pairs. train_rows counts needs, of
    which there are 368: where more are asked for, as by a run's default, all are taught."""
    known = w.World().need_facts("tools", min(train_rows, len(w.World().pools["tools"])), seed)
    rng = random.Random(f"tools pairs {seed}")
    trained: set[frozenset[w.Fact]] = set()

    def ask(template: int) -> list[dict[str, Any]]:
        shuffled = rng.sample(known, len(known))
        pairs = list(zip(shuffled[::2], shuffled[1::2], strict=False))
        if template in w.TRAIN_TEMPLATES:
            trained.update(map(frozenset, pairs))
        else:
            pairs = [p for p in pairs if frozenset(p) not in trained]
        docs = []
        for group in [*((f,) for f in known), *pairs]:
            query = " and ".join(f.subject for f in group)
            answers = [f.answer for f in group]
            docs.append(_doc(w.TOOL_TEMPLATES[template].format(q=query), answers, " , ".join(answers)))
        return docs

    return _splits(
        seed,
        eval_rows,
        train=[doc for i in w.TRAIN_TEMPLATES for doc in ask(i)],
        validation=ask(w.DEV_TEMPLATE),
        test=ask(w.TEST_TEMPLATE),
    )


# ---- synthetic: sums in words (stands in for GSM8K: little knowledge) ----


_SUMS_BLOCK = 600


def arithmetic(seed: int = 0, train_rows: int = 4000, eval_rows: int = 600, **_: Any) -> DatasetDict:
    """Two-number word problems; validation and test use number pairs that no training text shows, the base's included,
    and share no prompt.

    The wordings are the same in all splits: what is asked for is the skill, which the base has in part.
    """
    names = w.World().first
    rng = random.Random(f"arithmetic train {seed}")
    held_out = _held_out_sums(seed, eval_rows, names)
    return _splits(seed, eval_rows, train=[_sum(rng, names, False) for _ in range(train_rows)], **held_out)


def _sum(rng: random.Random, names: list[str], held_out: bool) -> dict[str, Any]:
    a, b, op = w.draw_sum(rng, held_out)
    text = rng.choice(w.ADD_TEMPLATES if op == "+" else w.SUB_TEMPLATES)
    return _doc(text.format(a=a, b=b, n=rng.choice(names)), [w.solve(a, b, op)])


def _held_out_sums(seed: int, count: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """validation and test, count documents each. What one of them has asked is drawn again for the other.

    They take turns, a whole block at a time, so that a document depends on its number and never on count: runs that
    evaluate fewer documents must mean the same by the same id.
    """
    made: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
    asked: dict[str, set[str]] = {split: set() for split in made}
    first, again = ({split: random.Random(f"arithmetic {split}{word} {seed}") for split in made}
                    for word in ("", " again"))  # fmt: skip
    while len(made["test"]) < count:
        for split, other in (("validation", "test"), ("test", "validation")):
            for _ in range(_SUMS_BLOCK):
                doc = _sum(first[split], names, True)
                while doc["prompt"] in asked[other]:
                    doc = _sum(again[split], names, True)
                asked[split].add(doc["prompt"])
                made[split].append(doc)
    return {split: docs[:count] for split, docs in made.items()}


# ---- real data: the hub at a pinned revision, or a local folder of JSON lines ----

HUB = {
    "nq_open": ("google-research-datasets/nq_open", "nq_open", "5dd9790a83002ad084ddeb7c420dc716852c6f28"),
    "squad": ("rajpurkar/squad", "plain_text", "7b6d24c440a36b6815f21b70d25016731768db1f"),
    "gsm8k": ("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee"),
    "metamath": ("meta-math/MetaMathQA", "default", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"),
}


def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file. Raises ValueError naming the line that is broken or lacks a field."""
    rows = []
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from None
                missing = [f for f in fields if not isinstance(row, dict) or f not in row]
                if missing:
                    raise ValueError(f"{path.name}, line {number} lacks {', '.join(missing)}")
                rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path.name}: {error}") from None
    if not rows:
        raise ValueError(f"{path.name} holds no rows")
    return rows


def _load(name: str, split: str, fields: tuple[str, ...], data_dir: str | None) -> list[dict[str, Any]]:
    """Rows of data_dir/name/split.jsonl[.gz] if a folder is given, else of the hub's pinned revision."""
    if data_dir is not None:
        for suffix in (".jsonl.gz", ".jsonl"):
            path = Path(data_dir) / name / f"{split}{suffix}"
            if path.is_file():
                return read_rows(path, fields)
        raise ValueError(f"no {name}/{split}.jsonl[.gz] in the data folder: docs/add_a_task.md says what it holds")
    if name not in HUB:
        raise ValueError(f"{name} has no copy on the hub: give a local folder with --data or MEFT_DATA")
    repository, subset, revision = HUB[name]
    try:
        return list(load_dataset(repository, subset, split=split, revision=revision))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise ValueError(
            f"cannot load {repository} from the hub ({type(error).__name__}): check the network, or give a local "
            "folder with --data or MEFT_DATA"
        ) from None


def _documents(
    name: str, split: str, fields: tuple[str, ...], data_dir: str | None, build: Build
) -> list[dict[str, Any]]:
    """A document for every row. Raises ValueError naming the row that does not hold what its fields promise."""
    documents = []
    for number, row in enumerate(_load(name, split, fields, data_dir), 1):
        try:
            documents.append(build(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name}/{split}, row {number} does not fit: {type(error).__name__} {error}") from None
    return documents


def _sampled(
    train: list[dict[str, Any]], test: list[dict[str, Any]], seed: int, train_rows: int, eval_rows: int
) -> DatasetDict:
    """train_rows to train on, eval_rows others of the same file for validation, and the test file's first rows.

    A question of the test file is left out of training and validation, and one that is trained out of validation: data
    sets repeat questions, and a repeated one is not unseen, however it is spelt (_asked). Where training takes every
    row, there is no validation.
    """
    if train_rows > len(train):
        raise ValueError(
            f"there are {len(train)} training rows, fewer than train_rows={train_rows}: lower train_rows, or give a "
            "folder with more rows"
        )
    tested = {_asked(doc) for doc in test}
    repeated = sum(_asked(doc) in tested for doc in train)
    if repeated == len(train):
        raise ValueError(f"all {len(train)} training rows are asked in the test: give a training file of other rows")
    # Drawn from the whole file, so that a few repeated questions do not change which of the others a seed takes.
    drawn = random.Random(f"rows {seed}").sample(train, min(len(train), train_rows + eval_rows + repeated))
    order = [doc for doc in drawn if _asked(doc) not in tested][: train_rows + eval_rows]
    trained = {_asked(doc) for doc in order[:train_rows]}
    validation = [doc for doc in order[train_rows:] if _asked(doc) not in trained]
    # The paper scores the first 501 rows of the test file.
    splits = {"train": order[:train_rows], "validation": validation, "test": test[:eval_rows]}
    return _splits(seed, eval_rows, **{name: rows for name, rows in splits.items() if rows or name != "validation"})


_SPELLING = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])|[?!.]+(?=\s)")
"""Hyphens between letters, and marks at the end of a word."""


def _asked(doc: dict[str, Any]) -> str:
    """What a prompt asks, whatever its case, its white space, its hyphens and the mark at its end."""
    return " ".join(_SPELLING.sub(" ", doc["prompt"].casefold()).split())


def _text(row: dict[str, Any], field: str) -> str:
    """A field of a row that is text. Raises ValueError naming it otherwise: null would be trained as "None"."""
    if not isinstance(row[field], str):
        raise ValueError(f"{field} must be text, not {row[field]!r}")
    return str(row[field])


def _strings(value: Any) -> list[str]:
    """value if it is a list of at least one string. Raises ValueError otherwise (a bare string is no list)."""
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"the answer must be a list of strings, not {value!r}")
    return list(dict.fromkeys(value))


def nq(
    data_dir: str | None = None, seed: int = 0, train_rows: int = 600, eval_rows: int = 501, **_: Any
) -> DatasetDict:
    """Natural Questions, open: question -> short answer."""
    fields = ("question", "answer")

    def build(row: dict[str, Any]) -> dict[str, Any]:
        return _doc(f"Question: {_text(row, 'question')}\nAnswer:", _strings(row["answer"]))

    train, test = (_documents("nq_open", split, fields, data_dir, build) for split in ("train", "validation"))
    return _sampled(train, test, seed, train_rows, eval_rows)


def squad(
    data_dir: str | None = None, seed: int = 0, train_rows: int = 600, eval_rows: int = 501, **_: Any
) -> DatasetDict:
    """SQuAD without its contexts: question -> span."""
    fields = ("question", "answers")

    def build(row: dict[str, Any]) -> dict[str, Any]:
        return _doc(f"Question: {_text(row, 'question').strip()}\nAnswer:", _strings(row["answers"]["text"]))

    train, test = (_documents("squad", split, fields, data_dir, build) for split in ("train", "validation"))
    return _sampled(train, test, seed, train_rows, eval_rows)


def gsm8k(
    data_dir: str | None = None, seed: int = 0, train_rows: int = 600, eval_rows: int = 501, **_: Any
) -> DatasetDict:
    """Grade-school sums, worked out. Trains on MetaMathQA; from a folder without it, on GSM8K's own training rows."""

    def build(row: dict[str, Any]) -> dict[str, Any]:
        if "query" in row:
            question, worked = _text(row, "query"), _text(row, "response")
            final = worked.rsplit("The answer is:", 1)[-1].strip()
        else:
            question, (worked, final) = _text(row, "question"), _text(row, "answer").rsplit("####", 1)
            final = final.strip().replace(",", "")
            worked = f"{re.sub(r'<<[^>]*>>', '', worked).strip()}\nThe answer is: {final}"
        return _doc(f"Question: {question}\nAnswer:", [final], worked)

    own = data_dir is not None and not any((Path(data_dir) / "metamath").glob("train.jsonl*"))
    if own:
        train = _documents("gsm8k", "train", ("question", "answer"), data_dir, build)
    else:
        train = _documents("metamath", "train", ("query", "response"), data_dir, build)
    test = _documents("gsm8k", "test", ("question", "answer"), data_dir, build)
    return _sampled(train, test, seed, train_rows, eval_rows)


def toolbench(
    data_dir: str | None = None, seed: int = 0, train_rows: int = 600, eval_rows: int = 501, **_: Any
) -> DatasetDict:
    """ToolBench requests -> their set of APIs. One file, split by query: a fifth of the queries is the test."""
    fields = ("query_id", "query", "relevant_apis")

    def build(row: dict[str, Any]) -> dict[str, Any]:
        apis = _strings([" : ".join(pair) for pair in row["relevant_apis"]])
        in_test = zlib.crc32(str(row["query_id"]).encode()) % 5 == 0
        return {**_doc(f"Query: {_text(row, 'query')}\nAPIs:", apis, " ; ".join(apis)), "in_test": in_test}

    documents = _documents("toolbench", "instructions", fields, data_dir, build)
    train, test = ([d for d in documents if d["in_test"] == wanted] for wanted in (False, True))
    return _sampled(train, test, seed, train_rows, eval_rows)
