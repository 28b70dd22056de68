"""The synthetic documents: what training and test share, what they must not, and what a seed decides."""

import hashlib
import json
import random
from collections import Counter

import pytest
from datasets import DatasetDict
from meft_bench.tasks import docs
from meft_bench.tasks import world as w

from meft_bench.harness.spec import PACKAGE

SYNTHETIC = {"facts": docs.facts, "cloze": docs.cloze, "tools": docs.tools, "arithmetic": docs.arithmetic}
synthetic = pytest.mark.parametrize("task", SYNTHETIC)
EVALUATION = ("recall", "validation", "test")


def make(task: str, **metadata) -> DatasetDict:
    return SYNTHETIC[task](**{"train_rows": 60, "eval_rows": 50, **metadata})


def prompts(made: DatasetDict, split: str) -> set[str]:
    return set(made[split]["prompt"])


@synthetic
def test_splits_and_fields(task: str) -> None:
    made = make(task)
    assert set(made) == {"train", *EVALUATION}
    for rows in made.values():
        assert set(rows.column_names) == {"id", "prompt", "target", "answers"}
        for row in rows:
            assert row["prompt"] and row["answers"] and all(row["answers"]) and "{" not in row["prompt"]
            assert row["prompt"] == row["prompt"].strip() and row["target"] == row["target"].strip()


@synthetic
def test_no_prompt_of_training_is_asked_in_the_test(task: str) -> None:
    made = make(task)
    trained = prompts(made, "train")
    assert not trained & prompts(made, "validation") and not trained & prompts(made, "test")


@synthetic
@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_in_two_of_training_validation_and_test(task: str, seed: int) -> None:
    """At the suite's own sizes, where chance meetings are likely: rates are chosen on validation, so it must not show
    what the test asks."""
    made = make(task, seed=seed, train_rows=300, eval_rows=600)
    train, validation, test = (prompts(made, split) for split in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    assert prompts(made, "recall") <= train


@synthetic
def test_an_id_means_the_same_however_many_are_evaluated(task: str) -> None:
    """Records are compared item by item, by id."""
    few, many = make(task, eval_rows=45), make(task, eval_rows=1300)
    for split in ("validation", "test"):
        known = {row["id"]: row for row in many[split]}
        assert all(row == known[row["id"]] for row in few[split] if row["id"] in known)
        assert task != "arithmetic" or set(few[split]["id"]) <= set(known)


@synthetic
def test_recall_is_drawn_from_training(task: str) -> None:
    made = make(task)
    train = {row["id"]: row for row in made["train"]}
    assert len(made["recall"]) == min(50, len(train))
    assert all(train[row["id"]] == row for row in made["recall"])


@synthetic
def test_ids_are_unique_and_name_their_split(task: str) -> None:
    for split, rows in make(task).items():
        assert len(set(rows["id"])) == len(rows)
        assert all(i.startswith(f"{'train' if split == 'recall' else split}-") for i in rows["id"])


@synthetic
def test_evaluation_is_cut_and_training_is_not(task: str) -> None:
    few, many = make(task, eval_rows=7), make(task, eval_rows=200)
    assert [len(few[split]) for split in EVALUATION] == [7, 7, 7]
    assert len(few["train"]) == len(many["train"]) >= 60
    assert prompts(few, "train") == prompts(many, "train"), "what is trained must not depend on how much is evaluated"


@synthetic
def test_a_seed_decides_everything(task: str) -> None:
    once, again, other = make(task, seed=3), make(task, seed=3), make(task, seed=4)
    for split in once:
        assert once[split].to_list() == again[split].to_list()
        assert once[split].to_list() != other[split].to_list()
    assert prompts(once, "train") != prompts(other, "train")


@synthetic
def test_every_word_is_in_the_vocabulary(task: str) -> None:
    """The embedded base's tokenizer knows these words and digits; another word would become <unk>."""
    known = set(w.World().vocabulary())
    for rows in make(task).values():
        for row in rows:
            words = f"{row['prompt']} {row['target']}".split()
            assert all(word in known or word.lstrip("-").isdigit() for word in words)


# ---- people ----


@pytest.mark.parametrize(("task", "templates"), [("facts", w.QUESTIONS), ("cloze", w.FRAMES)])
def test_test_asks_the_trained_facts_in_unseen_words(task: str, templates: dict) -> None:
    made = make(task, train_rows=60, eval_rows=1000, seed=2)
    known = w.World().people_facts(task, 10, 2)
    assert len(known) == 60

    def asked(numbers: tuple[int, ...]) -> set[tuple[str, str]]:
        return {(templates[f.attribute][i].format(n=f.subject), f.answer) for f in known for i in numbers}

    for split, numbers in (("train", (0, 1, 2, 3)), ("recall", (0, 1, 2, 3)), ("validation", (4,)), ("test", (5,))):
        rows = made[split]
        assert {(row["prompt"], row["answers"][0]) for row in rows} == asked(numbers)
        assert len(rows) == 60 * len(numbers) and all(row["target"] == row["answers"][0] for row in rows)


def test_templates_differ_and_hold_the_person_once() -> None:
    for group in (w.QUESTIONS, w.FRAMES):
        texts = [t for templates in group.values() for t in templates]
        assert len(set(texts)) == len(texts) == 36 and all(t.count("{n}") == 1 for t in texts)


def test_what_the_base_knows_is_never_taught() -> None:
    pools = w.World().pools
    for names in (("base", "facts", "cloze"), ("base_needs", "tools")):
        parts = [set(pools[name]) for name in names]
        assert sum(map(len, parts)) == len(set.union(*parts)) == sum(len(pools[name]) for name in names)
    base = set(pools["base"])
    for task in ("facts", "cloze"):
        asked = " ".join(prompts(make(task, train_rows=600, eval_rows=600), "train"))
        assert not any(person in asked for person in base)


def test_the_same_person_has_another_answer_under_another_seed() -> None:
    """So a run with a second seed cannot profit from a base that was fine-tuned with the first."""
    first, second = (
        {(f.subject, f.attribute): f.answer for f in w.World().people_facts("facts", None, s)} for s in (0, 1)
    )
    assert first.keys() == second.keys()
    assert sum(first[k] == second[k] for k in first) < 0.01 * len(first)


def test_more_facts_than_people_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(ValueError, match="the facts pool holds 4000 subjects; 5000 asked: choose 1 to 4000"):
        docs.facts(train_rows=30_000)


# ---- tools ----


def groups_of(made: DatasetDict, split: str) -> set[frozenset[str]]:
    """The needs of each request, without its wording."""
    needs = w.World().pools["tools"]
    return {frozenset(n for n in needs if f" {n} " in f" {row['prompt']} ") for row in made[split]}


def test_tools_ask_single_needs_and_pairs() -> None:
    made = make("tools", train_rows=40, eval_rows=1000)
    for split in ("train", "validation", "test"):
        assert {len(g) for g in groups_of(made, split)} == {1, 2}
        for row in made[split]:
            assert row["target"] == " , ".join(row["answers"])
            assert row["prompt"].count(" and ") == len(row["answers"]) - 1
    single = {g for g in groups_of(made, "train") if len(g) == 1}
    assert single == {g for g in groups_of(made, "test") if len(g) == 1} and len(single) == 40


def test_every_need_is_asked_alone_and_at_most_once_in_a_pair_of_each_wording() -> None:
    """So that no need is taught more often than another."""
    made = make("tools", train_rows=41, eval_rows=1000)
    needs = w.World().pools["tools"]
    for template in w.TRAIN_TEMPLATES:
        head, tail = w.TOOL_TEMPLATES[template].split("{q}")
        own = [p for p in made["train"]["prompt"] if p.startswith(head) and p.endswith(tail)]
        asked = [n for p in own for n in p.removeprefix(head).removesuffix(tail).split(" and ")]
        counts = sorted(Counter(asked).values())
        assert set(asked) <= set(needs) and counts == [1] + [2] * 40, "of 41 one has no partner"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_tools_test_pairs_are_new_pairs(split: str) -> None:
    made = make("tools", train_rows=200, eval_rows=1000)
    trained = {g for g in groups_of(made, "train") if len(g) == 2}
    asked = {g for g in groups_of(made, split) if len(g) == 2}
    assert asked and not asked & trained


def test_all_needs_are_taught_where_more_are_asked_for() -> None:
    """As by a run that does not say how many."""
    assert make("tools", train_rows=600)["train"].to_list() == make("tools", train_rows=368)["train"].to_list()
    assert len(w.World().pools["tools"]) == 368


# ---- sums ----


def test_sums_already_asked_in_validation_are_drawn_again_and_all_others_stay() -> None:
    """Seed 0: validation is what the rates were chosen on, and of the 600 test sums 72 had to change, each in place."""
    made, names = make("arithmetic", train_rows=10, eval_rows=600), w.World().first
    first = {split: random.Random(f"arithmetic {split} 0") for split in ("validation", "test")}
    before = {split: [docs._sum(first[split], names, True)["prompt"] for _ in range(600)] for split in first}
    assert list(made["validation"]["prompt"]) == before["validation"]
    changed = [old != new for old, new in zip(before["test"], made["test"]["prompt"], strict=True)]
    assert changed == [old in set(before["validation"]) for old in before["test"]] and sum(changed) == 72


def pairs(made: DatasetDict, split: str) -> set[tuple[int, int]]:
    return {tuple(int(x) for x in row["prompt"].split() if x.isdigit()) for row in made[split]}


def test_pairs_of_the_test_are_never_trained() -> None:
    """Over several seeds, since the base saw the pairs of all of them."""
    made = [make("arithmetic", train_rows=1500, eval_rows=300, seed=seed) for seed in range(3)]
    trained = set.union(*(pairs(one, "train") for one in made))
    asked = set.union(*(pairs(one, split) for one in made for split in ("validation", "test")))
    assert len(trained) > 600 and len(asked) > 150 and not trained & asked
    assert all(w.sum_is_held_out(a, b) for a, b in asked)
    assert not any(w.sum_is_held_out(a, b) for a, b in trained)


def test_a_fifth_of_the_pairs_is_held_out() -> None:
    """Spread over all sums: no first number is held out or trained altogether."""
    held_out = [[w.sum_is_held_out(a, b) for b in range(10)] for a in range(100)]
    assert sum(map(sum, held_out)) == pytest.approx(200, abs=40)
    assert not any(all(row) for row in held_out)
    assert all(0 < sum(row[b] for row in held_out) < 100 for b in range(10))


def worded_as(prompt: str, templates: tuple[str, ...]) -> bool:
    """True if one of the templates gives the prompt for some numbers and name."""
    words = prompt.split()
    parts = [t.split() for t in templates if len(t.split()) == len(words)]
    return any(all(p.startswith("{") or p == word for p, word in zip(part, words, strict=True)) for part in parts)


def test_sums_are_right() -> None:
    made = make("arithmetic", train_rows=300, eval_rows=100)
    for row in [row for split in made for row in made[split]]:
        a, b = (int(x) for x in row["prompt"].split() if x.isdigit())
        plus, minus = (worded_as(row["prompt"], t) for t in (w.ADD_TEMPLATES, w.SUB_TEMPLATES))
        assert plus is not minus
        assert row["answers"] == [row["target"]] == [str(a + b if plus else a - b)] and int(row["target"]) >= 0


# ---- the world that the shipped base was trained on ----


def test_the_worlds_words_are_the_shipped_tokenizers() -> None:
    """Another word anywhere, and the base would read <unk> where it was taught a name."""
    tokenizer = json.loads((PACKAGE / "embedded" / "tokenizer.json").read_text(encoding="utf-8"))
    known = sorted(tokenizer["model"]["vocab"], key=dict(tokenizer["model"]["vocab"]).get)
    words = [word.removeprefix("\u2581") for word in known if word.startswith("\u2581") and len(word) > 1]
    assert words == w.World().vocabulary()


def test_the_pools_are_those_that_the_base_was_trained_apart_from() -> None:
    """The base knows the first pool by heart; a reshuffle would teach what it knows and ask it what it cannot."""
    pools = w.World().pools
    assert {name: len(pool) for name, pool in pools.items()} == {
        "base": 1000, "facts": 4000, "cloze": 96 * 96 - 5000, "base_needs": 400, "tools": 24 * 32 - 400,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(pools).encode()).hexdigest()
    assert digest == "c0828f4d8d9a19334012124c05a9eecf87ab1ba387338029e0f5e931e093a20f"
    world = w.World()
    assert all(name[0].isupper() for name in [*world.first, *world.last])
    assert all(value.islower() for pair in world.values.values() for slot in pair for value in slot)


def test_an_answer_is_ten_bits() -> None:
    heads, tails = w.World().values["town"]
    assert len(set(heads)) * len(set(tails)) == 2**w.BITS_PER_FACT and not set(heads) & set(tails)


def test_no_subject_at_all_is_refused() -> None:
    for count in (0, -1, 4001):
        with pytest.raises(ValueError, match="choose 1 to 4000"):
            w.World().people_facts("facts", count, 0)
    assert len(w.World().people_facts("facts", 4000, 0)) == 24_000
