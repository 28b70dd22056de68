"""What a model forgot: nothing against itself, all of a fact that was overwritten, the divergence of its definition."""

import math

import pytest
import torch
from meft_bench.tasks import known

from meft_bench.harness import forgetting
from meft_bench.train import models


@pytest.fixture(scope="module")
def loaded():
    found = models.load_model("embedded", None, "float32", "cpu")
    found.model.eval()
    return found


def test_against_itself_nothing_is_lost(loaded) -> None:
    block = forgetting.forgetting(loaded.model, loaded.model, loaded.tokenizer)
    for text in ("held_out", "own_text"):
        assert block[text]["kl_nats_per_token"] == 0
        assert block[text]["nats_per_token"] == block[text]["base_nats_per_token"] > 0
    for way in ("greedy", "choice"):
        assert block["known"][way].get("kept", 1) == 1
        assert len(block["known"][way]["items"]) == block["known"][way]["base_right"] <= block["known"]["asked"]


class Fixed(torch.nn.Module):
    """Always the same chances of the next token."""

    def __init__(self, chances: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(chances).log())

    def forward(self, input_ids, **_):
        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


@torch.no_grad()
def test_loss_and_divergence_are_those_of_their_definition() -> None:
    base, model = Fixed([0.5, 0.25, 0.25]), Fixed([0.25, 0.5, 0.25])
    block = forgetting._compared(model, base, [[0, 1, 2, 0]], 0)
    assert block["tokens"] == 3
    assert block["nats_per_token"] == pytest.approx(-(math.log(0.5) + 2 * math.log(0.25)) / 3, abs=1e-6)
    assert block["kl_nats_per_token"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert forgetting._compared(model, base, [[0, 1, 2, 0]], 1)["tokens"] == 2


@torch.no_grad()
def test_a_fact_is_kept_when_greedy_writes_it_and_when_it_is_likelier_than_the_others(loaded, monkeypatch) -> None:
    """The embedded base states its own facts; a model that says nothing but one token keeps none of them."""
    from meft_bench.embedded.pretrain import BaseRecipe, BaseText

    text = next(t for t in BaseText(BaseRecipe()).batch() if "?" in t)
    prompt, answer = text.split(" ? ")
    asked = [known.Known("base", f"{prompt} ?", answer, ("zzz", "a a"))]
    monkeypatch.setattr(known, "questions", lambda: asked)
    stuck = Fixed([1.0 if i == 7 else 1e-6 for i in range(loaded.model.config.vocab_size)])
    block = forgetting._known(stuck, loaded.model, loaded.tokenizer)
    assert block["asked"] == 1
    for way in ("greedy", "choice"):
        assert block[way]["base_right"] in (0, 1) and not any(block[way]["items"])
    assert block["choice"]["base_right"] == 1


def test_the_base_writes_the_same_text_every_time(loaded) -> None:
    first, second = (forgetting.own_text(loaded.model, loaded.tokenizer) for _ in range(2))
    assert first == second and len({len(row) for row in first}) == 1


def test_every_question_has_its_answer_once_and_others_of_its_kind() -> None:
    asked = known.questions()
    assert len({q.prompt for q in asked}) == len(asked) > 100
    for q in asked:
        answers = set(known.KINDS[q.kind][1].values())
        assert q.answer not in q.others and set(q.others) <= answers and len(set(q.others)) == len(q.others) >= 3
