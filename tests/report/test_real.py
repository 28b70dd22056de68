"""The real model leads as soon as its main comparison has all seeds, and never with half of them. No number here was
measured."""

from dataclasses import replace

import matplotlib.text
import pytest

from meft_bench.harness import smollm2, suites
from meft_bench.harness.rates import learning_rates_swept
from meft_bench.harness.rows import ROWS
from meft_bench.harness.spec import PACKAGE
from meft_bench.harness.suites import SEEDS
from meft_bench.report import blocks
from meft_bench.report.claims import takeaways as t
from meft_bench.report.claims.entries import Ledger, Shown
from meft_bench.report.claims.file import load_claims
from meft_bench.report.claims.ledger import judge
from meft_bench.report.claims.sentences import difference_words
from meft_bench.report.figures import gained, output
from meft_bench.report.page import page as html
from meft_bench.report.records import real as on_real
from meft_bench.report.records.quantities import difference
from meft_bench.report.records.results import Results, headline
from meft_bench.report.records.stats import wilson
from meft_bench.report.tables import facts
from meft_bench.report.tables import scores as tables
from meft_bench.report.tables.claims import claims_table
from meft_bench.report.tables.pretrained import pretrained
from meft_bench.report.text import Table

from .made_records import broken, make_record, real_record, results_of

BOOK = load_claims(PACKAGE.parent / "results" / "paper" / "claims.yaml")
SUITE = smollm2.cells("local/smollm2-135m@000000000000", "local@000000000000")
CELLS = [c for c in SUITE if c.spec.seed in SEEDS]  # each place with as many seeds
RIGHT = {"meft": 14, "lora_ffn": 18, "base": 0, "full": 19}
EMPTY = results_of([], [])


def made(keep) -> Results:
    """The suite with the runs that keep(cell) names; every other seed gets one more right."""
    found = [c for c in CELLS if keep(c)]
    return results_of(CELLS, [real_record(c, RIGHT.get(c.row, 9) + c.spec.seed % 2 * (c.row != "base")) for c in found])


def first(c) -> bool:
    return c.share in ("10%", "0%", "100%") and c.spec.task == "people"


def nq(c, seeds: int = 3) -> bool:
    return c.share in ("10%", "0%", "100%") and c.spec.task == "nq" and c.spec.seed < seeds


def ledger(real: Results | None) -> Ledger:
    return judge(BOOK, EMPTY, EMPTY, {}, real)


def all_blocks(real: Results | None) -> dict[str, str]:
    return blocks.blocks(ledger(real), EMPTY, (), "full", "", real)


@pytest.mark.parametrize("real", [None, made(lambda c: first(c) and c.spec.seed < 2)], ids=["none", "two seeds"])
def test_before_all_seeds_are_there_the_embedded_model_leads(real: Results | None) -> None:
    shown = all_blocks(real)
    assert "tiny language model" in shown["about"] and "A tiny model shows" in shown["limits"]
    assert "figure1.png" in shown["picture"] and "On **SmolLM2-135M**" not in shown["findings"]
    said = "22 of 135 planned runs are there: people 22 of 60, NQ 0 of 57"
    assert (said in shown["table"] and "no comparison has all its seeds yet" in shown["table"]) == (real is not None)
    assert "People, other wording" not in shown["table"] and gained.draw(real) == {}


def test_with_one_whole_task_it_leads_and_says_what_lacks() -> None:
    shown = all_blocks(made(lambda c: first(c) or nq(c, 1)))
    assert shown["about"].startswith("**SmolLM2-135M** is a real") and "NQ" not in shown["about"]
    assert "Models of one and of 135 million parameters" in shown["limits"] and "gained_lost" in shown["picture"]
    head, *lines = [x for x in shown["table"].splitlines() if x.startswith("|")]
    assert head == "| Method | Trained | People, other wording | Known facts kept |"
    (meft,) = [x for x in lines if x.startswith("| MEFT |")]
    assert meft == "| MEFT | 10% | 0.717 [0.592, 0.815] | 0.800 [0.490, 0.943] |"
    assert "suite 44 of 135 planned runs are there. All" in shown["table"] and "Natural" not in shown["table"]


def test_a_place_with_some_of_its_seeds_shows_their_count_and_no_score() -> None:
    shown = all_blocks(made(lambda c: first(c) or nq(c, 3 if c.row in ("meft", "full") else 2)))
    lines = {x.split(" | ")[0][2:]: x for x in shown["table"].splitlines() if x.startswith("| ")}
    assert lines["LoRA"].count("2 of 3 seeds so far") == 1 and "seeds" not in lines["MEFT"]
    assert "| NQ, as taught | Known facts kept |" in lines["Method"]


def test_a_run_that_diverged_is_told_and_counts_as_there() -> None:
    cells = [c for c in CELLS if first(c)]
    records = [real_record(c) for c in cells]
    lost = [broken(r, "diverged", "nan") if c.row == "lora" and c.spec.seed == 1 else r
            for c, r in zip(cells, records, strict=True)]  # fmt: skip
    real = results_of(CELLS, lost)
    assert on_real.whole(real, ("lora", "10%"), "people")
    assert "(2 of 3 seeds)" in blocks.real_table(real)


def test_runs_that_ended_without_a_score_are_not_told_as_missing() -> None:
    cells = [c for c in CELLS if first(c)]
    records = [broken(real_record(c), "oom", "out of memory") for c in cells]
    assert "no run has a score" in blocks.real_table(results_of(CELLS, records))
    lost = [
        broken(r, "diverged", "nan") if c.row == "meft" else r
        for c, r in zip(cells, map(real_record, cells), strict=True)
    ]
    real, label = results_of(CELLS, lost), "meft 10% people minus lora 10% people"
    shown = Shown(label=label, words=label, values=difference(real, *label.split(" minus ")))
    said = "MEFT at 10% beside LoRA at 10% on invented people: no value, as runs ended: diverged."
    assert difference_words(shown, "3 seeds") == said
    missing = replace(shown, values=difference(EMPTY, *label.split(" minus ")))
    assert difference_words(missing, "3 seeds").endswith(": not run.")


def test_findings_follow_the_verdicts_on_the_real_model_and_the_rest_follows() -> None:
    real = made(lambda c: first(c) or nq(c))
    text = t.takeaways(ledger(real), (), real)
    numbered = [x for x in text.splitlines() if x[:1].isdigit()]
    assert [x.split(".")[0] for x in numbered] == [str(i + 1) for i in range(len(numbered))]
    assert numbered[0].startswith("1. **At the same size MEFT does as well as the ordinary adapter.**")
    assert numbered[1].startswith("2. **MEFT does worse than full fine-tuning.**")
    assert text.index("On **SmolLM2-135M**:") < text.index("On the embedded model, and on a simulated card:")
    assert "was not run" in numbered[-1] and "Whether MEFT learns more facts" in numbered[4]


def test_a_score_of_the_trained_questions_is_called_so() -> None:
    (claim,) = [c for c in ledger(made(lambda c: first(c) or nq(c))).claims if c.id == "t1-comparable-to-dense"]
    assert claim.pretrained is not None
    people, again = claim.pretrained.parts
    assert "on Natural Questions asked as taught (" in difference_words(again, "3 seeds")
    assert "on invented people (" in difference_words(people, "3 seeds")
    assert again.words.endswith("on nq, asked again as it was taught") and people.words.endswith("on people")


@pytest.mark.parametrize(("right", "head"), [(18, "learns more than MEFT"), (4, "learns less"), (14, "do not tell")])
def test_lora_beside_meft_is_told_by_its_interval(right: int, head: str) -> None:
    records = [real_record(c, right if c.row == "lora_ffn" else 14 + c.spec.seed % 2) for c in CELLS if first(c)]
    assert head in t.beside_lora(results_of(CELLS, records))


def test_a_finding_without_a_verdict_says_that_a_run_diverged() -> None:
    """Its interval may lie beyond the margin: what keeps it open is the run that gave no number."""
    records = [broken(r, "diverged", "nan") if c.row == "full" and c.spec.seed == 1 and first(c) else r
               for c in CELLS if first(c) or nq(c) for r in [real_record(c, RIGHT.get(c.row, 9))]]  # fmt: skip
    real = results_of(CELLS, records)
    (told,) = [x for x in t.takeaways(ledger(real), (), real).splitlines() if "full fine-tuning is not settled" in x]
    assert "measured, 2 seeds, n = 40; without 1 that ended: diverged)" in told


def test_intervals_of_questions_that_every_seed_is_asked_are_called_bootstrap() -> None:
    scores = pretrained(made(lambda c: nq(c)))[0].markdown
    assert (
        "Wilson for scores of 0 and 1, bootstrap over items for IoU and for questions that every seed is asked."
        in scores
    )
    alone = tables.real(results_of([c for c in CELLS if nq(c, 1)], [])).markdown
    assert "Wilson for scores of 0 and 1." in alone


def test_lora_beside_meft_on_nq_is_told_by_what_was_taught() -> None:
    """New questions of NQ ask what the base knows: a difference there is none of what was learnt."""

    def record(c):
        made = real_record(c, 18)
        if c.row == "lora_ffn":
            made["quality"]["test"] = real_record(c, 4 + c.spec.seed % 2)["quality"]["test"]
        return made

    told = t.beside_lora(results_of(CELLS, [record(c) for c in CELLS if nq(c)]))
    assert "the seeds do not tell them apart" in told and "scored 0.0 points more" in told
    assert "on Natural Questions asked as taught (" in told


def test_what_was_forgotten_is_told_with_the_seeds_spread() -> None:
    kept = {"meft": 9, "full": 2}
    records = [real_record(c, kept=kept.get(c.row, 10) - 2 * (c.row == "meft" and c.spec.seed == 1))
               for c in CELLS if first(c)]  # fmt: skip
    told = t.forgot(results_of(CELLS, records))
    assert told.startswith("**Teaching makes the model forget.**") and told.endswith(
        "(adapters at 10%; lowest and highest of 3 seeds; measured)."
    )
    assert "MEFT 83 % (70 to 90)" in told and "Full fine-tuning 20 % (20 to 20)" in told and "LoRA, FFN 100 %" in told
    assert "Natural Questions" not in told, "no run of it is there"
    both = [real_record(c, kept=6 if nq(c) else 9) for c in CELLS if first(c) or nq(c)]
    last = t.forgot(results_of(CELLS, both))
    assert "after training on Natural Questions: MEFT 60 % (60 to 60)" in last and "MEFT 90 %" not in last
    stays = t.forgot(results_of(CELLS, [real_record(c, kept=10) for c in CELLS if first(c)]))
    assert stays.startswith("**What the model knew has stayed.**")


def test_a_fact_that_every_seed_is_asked_is_one_fact() -> None:
    """Ten facts asked of three runs are not thirty: Wilson of 8 in 10, and where runs differ, over ten means."""
    cells = [c for c in CELLS if first(c) and c.row == "meft"]
    assert on_real.kept([real_record(c, kept=8) for c in cells]) == [1.0] * 8 + [0.0] * 2
    differ = [real_record(c, kept=8 - 2 * c.spec.seed) for c in cells]
    assert on_real.kept(differ) == pytest.approx([1] * 4 + [2 / 3] * 2 + [1 / 3] * 2 + [0] * 2)
    assert on_real.kept_by_run(differ) == [0.8, 0.6, 0.4]
    table = next(x for x in pretrained(results_of(CELLS, differ)) if x.name == "smollm2_forgetting").csv
    assert "0.600 ±0.200 [" in table and "] of 10" in table


def test_new_real_questions_are_the_same_for_every_seed_and_count_once() -> None:
    real = results_of(CELLS, [real_record(c, 15) for c in CELLS if nq(c)])
    new, again = (real.score(("meft", "10%"), headline("nq", split)) for split in ("test", "recall"))
    n = new.n
    assert n and (new.low, new.high) == wilson(15, n) and (again.low, again.high) == wilson(45, 3 * n)


def test_every_base_that_runs_are_compared_with_is_told() -> None:
    cells = [c for c in CELLS if first(c) and c.row in ("meft", "full")]
    records = [real_record(c) for c in cells]
    for c, r in zip(cells, records, strict=True):
        r["probes"]["forgetting"]["held_out"]["base_nats_per_token"] = 4.25 if c.row == "full" else 4.5
    (table,) = [x for x in pretrained(results_of(CELLS, records)) if x.name == "smollm2_forgetting"]
    assert "loss there is 4.500 in bfloat16 and 4.250 in float32, in nats a token" in table.markdown


def with_verdicts(book: Ledger, **verdicts: str) -> Ledger:
    """Claims (id with _ for -) with the real model's finding on the embedded one, under another verdict."""
    changed = [
        replace(c, small=replace(c.pretrained, verdict=v)) if (v := verdicts.get(c.id.replace("-", "_"))) else c
        for c in book.claims
    ]
    return replace(book, claims=tuple(changed))


def test_a_disagreement_stands_first_with_both_verdicts() -> None:
    real = made(lambda c: first(c) or nq(c))
    book = ledger(real)
    assert t.disagreement(book).startswith("No claim is decided on both")
    against = with_verdicts(book, t1_comparable_to_dense="contradicted", t1_comparable_to_full="contradicted")
    told = t.disagreement(against)
    assert "disagrees with the embedded model** on 1 of the 2 claims" in told
    assert "*MEFT as good as the dense adapter*: supported (" in told
    assert "(its verdict first)" in told and told.index("supported (") < told.index("contradicted (")
    assert told.endswith("]; parts that hold: 2 of 2).")
    assert t.takeaways(against, (), real).startswith(told)
    five = {
        c.id.replace("-", "_"): "supported" if c.pretrained.verdict == "contradicted" else "contradicted"
        for c in book.claims
        if c.pretrained is not None and c.pretrained.verdict in ("supported", "contradicted")
    }
    many = t.disagreement(with_verdicts(book, **five))
    assert len(five) > 3 and many.endswith(f"and {len(five) - 3} more.") and len(many.split()) < 80, (
        "the README is short"
    )
    agreed = with_verdicts(book, t1_comparable_to_full="contradicted")
    assert t.disagreement(agreed).endswith("agree on the one claim that both decide.")


def test_the_figure_draws_whole_places_with_at_most_eight_names() -> None:
    real = made(lambda c: c.spec.task == "people" or nq(c, 2))
    with output.settings():
        figure = gained.gained(real)
    assert len(figure.axes) == 1, "no panel for a task that lacks seeds"
    names = [x.get_text() for x in figure.axes[0].findobj(matplotlib.text.Annotation) if x.get_text()]
    assert 7 <= len(set(names)) == len(names) <= 8 and "MEFT" in names
    heights = {round(float(y), 3) for line in figure.axes[0].lines for y in line.get_ydata()}
    assert round((14 + 15 + 14) / 60, 3) in heights


def uneven_seeds() -> Results:
    """The whole suite: five seeds where claims compare on people, three elsewhere, one of SQuAD and what follows it."""
    return results_of(SUITE, [real_record(c, RIGHT.get(c.row, 9) - c.spec.seed % 2 * (c.row == "meft")) for c in SUITE])


def test_where_tasks_have_other_numbers_of_seeds_each_number_says_its_own() -> None:
    real = uneven_seeds()
    shown = all_blocks(real)
    assert "of 20 questions a seed, with the 95 % interval over questions. Seeds: people 5, NQ 3." in shown["table"]
    assert "seeds)" not in shown["table"], "one number in each column"
    found = shown["findings"]
    assert found.count("measured, 5 seeds, n = 100)") == 3 and found.count("measured, 3 seeds)") == 1
    assert "lowest and highest of 3 seeds; measured" in found
    head, *lines = [x for x in pretrained(real)[0].markdown.splitlines() if x.startswith("| ")][:20]
    assert "| people, other wording (n = 20) | people, as taught (n = 20) |" in head
    assert "| NQ, as taught (n = 20, 3 seeds) |" in head and "| SQuAD, as taught (n = 20, 1 seed) |" in head
    contrasted = {(ROWS[row].title, share) for row, share in smollm2.CONTRASTED}
    for line in lines[1:]:
        method, size, *_, people = line.split(" | ")[:6]
        many = 5 if (method.removeprefix("| "), size) in contrasted else 3
        assert people.endswith(f"({many} seeds)"), line
    of_claims = claims_table(ledger(real)).markdown
    assert "holds if above -0.05); 5 seeds, n = 100 |" in of_claims


def test_the_figure_names_the_places_with_other_numbers_of_seeds() -> None:
    with output.settings():
        people, again = gained.gained(uneven_seeds()).axes
    assert "bars: 95 % over questions" in people.get_title("left")
    below = " ".join(people.get_xlabel().split())
    assert "3 seeds: LoRA, all linear 2%, 10%; MEFT 2%, 34%; MEFT, union reading 10%; AdapterH, start as wide" in below
    assert "others 5" in below and "others" not in again.get_xlabel()


def test_a_column_whose_places_have_other_numbers_of_seeds_tells_them_apart() -> None:
    """The embedded model's short table has five seeds of some methods and three of others."""
    cells = suites.full()
    text = blocks.short_table(results_of(cells, [make_record(c) for c in cells]), "full")
    lines = {x.split(" | ")[0][2:]: x for x in text.splitlines() if x.startswith("| ")}
    assert "Seeds: facts 3 to 5, cloze 3 to 5," in text
    assert "(5 seeds)" in lines["MEFT"] and "(3 seeds)" in lines["LoRA"] and "(5 seeds)" not in lines["LoRA"]


def test_the_page_has_a_section_of_its_own_for_it_before_the_verdicts() -> None:
    real = made(lambda c: first(c) or nq(c, 1))
    tables = {t.name: t for t in pretrained(real)} | {"table1": Table("table1", "| a |\n| --- |\n| b |\n", "")}
    shown = blocks.about(real)
    page = html.page(ledger(real), tables, {gained.NAME: gained.draw(real)[f"{gained.NAME}.png"]}, {}, {}, about=shown,
                     on_real={gained.NAME: (gained.TITLE, gained.CAPTION)}).decode()  # fmt: skip
    section, rest = page.split('<h2 id="real">')[1].split('<h2 id="verdicts">')
    for place in ('id="figure-gained_lost"', 'id="table-smollm2"', 'id="table-smollm2_forgetting"'):
        assert place in section and place not in rest
    assert 'id="table-table1"' in rest and "Not complete: 44 of 135 planned runs" in section
    assert "<strong>SmolLM2-135M</strong> is a real language model" in page.split("</header>")[0]


def test_the_rates_of_its_sweep_are_shown_with_their_scores() -> None:
    made_table = facts.real_sweep(smollm2.NAME)
    tried, chosen = learning_rates_swept(smollm2.NAME)
    assert made_table.name == "smollm2_sweep" and f"{chosen['meft 10%']:g}" in made_table.markdown
    assert len(made_table.csv.splitlines()) == 1 + len(tried)
    assert {line.split(",")[-4] for line in made_table.csv.splitlines()[1:]} >= {"10%"}
