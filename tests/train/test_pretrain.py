"""The embedded base is pretrained by the one loop, and comes out as by its steps written out."""

import torch

from meft_bench.cli import main
from meft_bench.embedded import pretrain as embedded
from meft_bench.embedded.pretrain import BaseRecipe, BaseText, build_model, build_tokenizer, pretrain

RECIPE = BaseRecipe(hidden_size=16, layers=1, ffn_size=24, heads=2, steps=5, batch_size=6, warmup_share=0.4, seed=3)


def written_out() -> tuple[torch.nn.Module, list[float], int]:
    """(model, losses, tokens): AdamW with the recipe's betas, linear rates, two halves of like lengths a step."""
    tokenizer = build_tokenizer()
    model, text = build_model(RECIPE, tokenizer), BaseText(RECIPE)
    optimizer = torch.optim.AdamW(model.parameters(), betas=RECIPE.betas, weight_decay=RECIPE.weight_decay, fused=True)
    losses, tokens = [], 0
    for scale in (1 / 2, 1, 3 / 3, 2 / 3, 1 / 3):
        texts = sorted((f"{t}</s>" for t in text.batch()), key=lambda t: t.count(" "))
        optimizer.param_groups[0]["lr"] = RECIPE.learning_rate * scale
        halves = [tokenizer(h, padding=True, padding_side="right", return_tensors="pt") for h in (texts[:3], texts[3:])]
        count = sum(int(half["attention_mask"][:, 1:].sum()) for half in halves)
        loss = 0.0
        for half in halves:
            labels = half["input_ids"].masked_fill(half["attention_mask"] == 0, -100)
            part = model(**half, labels=labels, use_cache=False, num_items_in_batch=count).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        tokens += count
    return model, losses, tokens


def test_pretraining_is_its_steps_written_out() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _, tokens = written_out()
        made, _, record = pretrain(RECIPE)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert record["tokens"] == tokens and record["losses_every_100_steps"] == []


def test_every_hundredth_loss_is_recorded(monkeypatch) -> None:
    from meft_bench.train import loop

    def hundred_losses(*_, **__):
        return None, loop.StepLog(loss=[float(step) for step in range(1, 251)], tokens_supervised=[2] * 250)

    monkeypatch.setattr(loop, "train", hundred_losses)
    record = pretrain(RECIPE)[2]
    assert (record["losses_every_100_steps"], record["tokens"]) == ([100.0, 200.0], 500)


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path, monkeypatch, capsys) -> None:
    def trained(recipe):
        raise AssertionError("it was pretrained first")

    monkeypatch.setattr(embedded, "pretrain", trained)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert main(["base", "--output", str(place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("meft-bench: ") and place.name in said and len(said.splitlines()) == 1
