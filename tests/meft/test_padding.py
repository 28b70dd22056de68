"""Padding selects nothing, on either side, in every reading; an empty selection is legal."""

import pytest
import torch
from torch import Tensor

from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.model import attach
from tests.meft.tiny_models import (
    GATES,
    D,
    fill_values,
    hidden,
    make_adapter,
    named,
    next_token_loss,
    small_config,
    tiny_llama,
    tokens,
)

LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
RIGHT = LEFT.flip(1)
MASKS = [pytest.param(LEFT, id="left"), pytest.param(RIGHT, id="right")]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", GATES, ids=named)
@pytest.mark.parametrize("selection", ["positive", "signed", "relu_first"])
def test_S_is_that_of_the_real_tokens_alone(selection: str, variant: dict, mask: Tensor) -> None:
    config = small_config(**variant, selection=selection)
    padded, h = make_adapter(config, mask), hidden()
    real = mask.bool()
    chosen = padded.select(h.reshape(-1, D), padded.batch.valid_tokens(h))
    alone = make_adapter(config).select(h[real], None)
    assert chosen.union_U.tolist() == alone.union_U.tolist()
    assert torch.equal(chosen.local_TK[real.flatten()], alone.local_TK)
    assert (chosen.local_TK[~real.flatten()] == -1).all()
    # Had the pads chosen, S would be larger, so the comparison can fail.
    assert len(make_adapter(config).select(h.reshape(-1, D), None).union_U) > len(alone.union_U)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", GATES, ids=named)
def test_real_tokens_are_computed_and_pads_get_zero(variant: dict, mask: Tensor) -> None:
    config, h, real = small_config(**variant), hidden(), mask.bool()
    out = make_adapter(config, mask)(h)
    torch.testing.assert_close(out[real], make_adapter(config)(h)[real], rtol=1e-5, atol=1e-6)
    assert not out[~real].any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reading", ["per_token", "union"])
def test_a_pad_s_content_changes_no_output_and_no_gradient(reading: str, mask: Tensor) -> None:
    """The loss reads real tokens alone, as in training with ignored labels."""

    def run(h: Tensor) -> list[Tensor]:
        adapter = make_adapter(small_config(reading=reading), mask)
        out = adapter(h)[mask.bool()]
        (out * hidden(1, len(out), seed=7)[0]).sum().backward()
        store = adapter.store
        return [out, store.keys.grad, store.values.grad, store.router.grad]

    other = torch.where(mask.bool()[..., None], hidden(), hidden(seed=3))
    for a, b in zip(run(hidden()), run(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cached_decoding_uses_the_last_columns_of_the_mask() -> None:
    """With a cache the mask covers past tokens as well: here one new token per row, the second row's a pad."""
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    adapter = make_adapter(small_config(), mask)
    out = adapter(hidden(2, 1))
    assert out[0].any() and not out[1].any()


def assert_nothing_happens(adapter, h: Tensor) -> None:
    """An empty S: zero output, no rows across the link, zero gradients everywhere."""
    h = h.clone().requires_grad_()
    out = adapter.train()(h)
    assert out.shape == h.shape and not out.any()
    out.sum().backward()
    assert not h.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in adapter.store.parameters())
    assert not adapter.store.touched_R.any()
    assert adapter.usage[0][1] == 0 and adapter.link.bytes["h2d", "rows"] == adapter.link.bytes["d2h", "grads"] == 0


@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("variant", GATES, ids=named)
def test_a_batch_of_pads_selects_nothing(variant: dict, reading: str) -> None:
    assert_nothing_happens(make_adapter(small_config(**variant, reading=reading), torch.zeros(2, 6)), hidden())


@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("variant", [{"gate": "softmax"}, {"gate": "none"}, {"key_experts": False}], ids=named)
def test_real_tokens_may_select_nothing(variant: dict, reading: str) -> None:
    """Every key points away from every token, so nothing fires."""
    adapter = make_adapter(small_config(**variant, reading=reading))
    adapter.store.keys.data = -adapter.store.keys.data.abs()
    assert_nothing_happens(adapter, hidden().abs())


def padded_ids(mask: Tensor) -> Tensor:
    return tokens() * mask


@pytest.mark.parametrize("mask", MASKS)
def test_the_model_s_attention_mask_reaches_every_layer(mask: Tensor) -> None:
    model = tiny_llama()
    meft = attach(model, small_config())
    model.train()
    model(padded_ids(mask), attention_mask=mask).logits.sum().backward()
    assert [adapter.usage[0][0] for adapter in meft.adapters] == [6, 6]
    model(tokens()).logits.sum().backward()
    assert [adapter.usage[1][0] for adapter in meft.adapters] == [12, 12], "an old mask must not stick"


def test_the_mask_may_be_given_by_position() -> None:
    """transformers takes attention_mask as second positional argument as well."""
    model = tiny_llama().train()
    meft = attach(model, small_config())
    model(padded_ids(LEFT), LEFT).logits.sum().backward()
    assert [adapter.usage[0][0] for adapter in meft.adapters] == [6, 6]


def test_left_padding_changes_no_generated_token() -> None:
    """In a batch with a longer prompt the shorter one goes on as it does alone."""
    model = tiny_llama()
    fill_values(attach(model, small_config()), size=1.0)
    ids = padded_ids(LEFT)
    together = model.generate(ids, attention_mask=LEFT, max_new_tokens=6, do_sample=False)
    short = ids[1:, 4:]
    alone = model.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=6, do_sample=False)
    assert together[1, 6:].tolist() == alone[0, 2:].tolist()


def test_padding_changes_no_gradient_of_a_model() -> None:
    """Two rows padded into one batch give the gradients of the two rows run alone."""

    def gradients(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        model = tiny_llama().train()
        meft = attach(model, small_config())
        fill_values(meft)
        for ids, mask in batches:
            logits = model(ids, attention_mask=mask).logits
            for row in range(len(ids)):
                real = mask[row].bool()
                next_token_loss(logits[row, real][None], ids[row, real][None]).backward(retain_graph=True)
        return [p.grad for store in meft.stores for p in store.parameters()]

    ids = padded_ids(RIGHT)
    alone = [(ids[i : i + 1, : RIGHT[i].sum()], torch.ones(1, int(RIGHT[i].sum()))) for i in range(2)]
    for together, apart in zip(gradients([(ids, RIGHT)]), gradients(alone), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


# ---- whose mask ----

FULL = torch.ones_like(RIGHT)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("reading", ["per_token", "union"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_with_the_mask_of_their_pass(reentrant: bool, reading: str, budget: int) -> None:
    """Two forward passes with a third in between, and one backward: newer passes must not lend their mask."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny_llama().train()
        meft = attach(model, small_config(reading=reading, device_budget=budget))
        fill_values(meft)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for seed, mask in enumerate((LEFT, RIGHT, FULL, None)):
            ids = tokens(seed=seed)
            losses.append(model(ids, attention_mask=mask, labels=ids, use_cache=False).loss)
            with torch.no_grad():
                model(ids[:1], attention_mask=LEFT[1:])
        sum(losses).backward()
        meft.collect_gradients()
        return [p.grad for store in meft.stores for p in store.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert plain.any()
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


def test_a_call_of_the_decoder_alone_has_its_own_mask() -> None:
    """Also after a call of the model that failed halfway."""
    model = tiny_llama()
    meft = attach(model, small_config(reading="union"))
    fill_values(meft)
    ids, decoder, used = tokens(), model.model, meft.adapters[1].batch

    def fails(*given: object) -> None:
        raise RuntimeError("stop")

    with torch.no_grad():
        plain, padded = decoder(ids).last_hidden_state, decoder(ids, attention_mask=LEFT).last_hidden_state
        within = model(ids, attention_mask=LEFT, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(within, padded) and used.attention_mask is None
        assert torch.equal(decoder(ids).last_hidden_state, plain)
        stopped = model.lm_head.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="stop"):
            model(ids, attention_mask=LEFT)
        stopped.remove()
        assert torch.equal(decoder(ids).last_hidden_state, plain) and not torch.equal(plain, padded)


def test_a_device_that_selects_gets_the_mask_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy of it would wait for all that a GPU was given before, in every layer. "meta" stands for the GPU."""
    there, batch, h = torch.device("meta"), BatchInfo(RIGHT), hidden()
    valid_T = batch.valid_tokens(h)
    assert valid_T is not None
    sent = batch.valid_there(valid_T, there)
    assert sent.device == there and batch.valid_there(valid_T, there) is sent
    assert batch.valid_there(valid_T, torch.device("cpu")) is valid_T
    batch.begin(LEFT)
    later_T = batch.valid_tokens(h)
    assert later_T is not None and torch.equal(batch.valid_there(later_T, torch.device("cpu")), LEFT.bool().flatten())

    asked: list[Tensor] = []
    inner = BatchInfo.valid_there
    monkeypatch.setattr(BatchInfo, "valid_there", lambda self, v, d: (asked.append(v), inner(self, v, d))[1])
    model = tiny_llama()
    attach(model, small_config(retrieval="device"))
    model(input_ids=tokens(), attention_mask=RIGHT)
    assert len(asked) == model.config.num_hidden_layers and len({id(v) for v in asked}) == 1
