"""Attaching to the decoders of transformers: every family, dtype moves, caching, checkpointing, refusals."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from meft_bench.meft.model import MeftModel, attach
from meft_bench.meft.sites import decoder_layers
from tests.meft.tiny_models import (
    LAYERS,
    VOCAB,
    D,
    fill_values,
    named,
    next_token_loss,
    small_config,
    tiny_llama,
    tiny_stack,
    tokens,
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 2 * D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1}
_GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
_OPT = {
    **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
    "ffn_dim": 2 * D,
    "word_embed_proj_dim": D,
    "dropout": 0.0,
}
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _COMMON),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {**_GROUPED, "sliding_window": 4}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, _GROUPED),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {**_GROUPED, "head_dim": 8}),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {**_GROUPED, "head_dim": 8}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _COMMON),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, _OPT),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, {**_GPT2, "eos_token_id": None, "pad_token_id": 0}),
}
families = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> nn.Module:
    config_class, model_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():  # at the usual init so small a model says the same token whatever it reads
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def one_step(meft: MeftModel) -> float:
    meft.model.train()
    optimizer = meft.make_optimizer(lr=1e-2, weight_decay=0.0)
    ids = tokens()
    loss = next_token_loss(meft.model(ids).logits, ids)
    loss.backward()
    optimizer.step()
    meft.model.eval()
    return loss.item()


@families
def test_unchanged_at_init_and_trained_by_a_step(family: str) -> None:
    ids, model = tokens(), build(family)
    before = model(ids).logits
    meft = attach(model, small_config())
    assert len(meft.adapters) == LAYERS
    assert torch.equal(model(ids).logits, before)
    assert torch.isfinite(torch.tensor(one_step(meft)))
    assert all(store.values.abs().max() > 1e-3 for store in meft.stores)
    assert not torch.equal(model(ids).logits, before)


@families
def test_greedy_decoding_is_the_same_with_and_without_cache(family: str) -> None:
    """Each token's adapter output depends on that token alone, so it does not matter when it is computed."""
    model = build(family)
    asked = {"attention_mask": torch.ones(2, 6), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    base = model.generate(tokens(), **asked)
    fill_values(attach(model, small_config()), size=1.0)
    cached = model.generate(tokens(), use_cache=True, **asked)
    assert cached.tolist() == model.generate(tokens(), use_cache=False, **asked).tolist()
    assert cached.tolist() != base.tolist(), "values this large must show"


@families
def test_the_adapter_reads_what_the_ffn_reads_and_adds_to_what_it_writes(family: str) -> None:
    """FFN(h) + adapter(h): with all neurons kept the formula can be put beside the layer by hand."""
    model, seen = build(family), {}
    first = dict(model.named_modules())[next(n for n, m in model.named_modules() if n.endswith(("mlp", "fc1")))]
    last = dict(model.named_modules())[next(n for n, m in model.named_modules() if n.endswith(("mlp", "fc2")))]
    first.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    last.register_forward_hook(lambda module, args, out: seen.update(ffn=out))
    meft = attach(model, small_config(key_experts=False, kept=24))
    fill_values(meft)
    last.register_forward_hook(lambda module, args, out: seen.update(both=out))
    model(tokens())
    store = meft.stores[0]
    adapter = (seen["h"] @ store.keys.T).relu() @ store.values
    torch.testing.assert_close(seen["both"], seen["ffn"] + adapter, rtol=1e-4, atol=1e-4)


@families
def test_padding_selects_nothing(family: str) -> None:
    """Also where the FFN is handed all tokens in one row, without a batch dimension (OPT)."""
    model = build(family).train()
    meft = attach(model, small_config())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    model(tokens() * mask, attention_mask=mask).logits.sum().backward()
    assert [adapter.usage[0][0] for adapter in meft.adapters] == [6, 6]


# ---- refusals ----


def test_attaching_twice_is_refused_and_the_first_adapter_goes_on() -> None:
    model = tiny_llama()
    meft = attach(model, small_config())
    with pytest.raises(ValueError, match="already has a parallel adapter: attach once"):
        attach(model, small_config())
    assert len(meft.parameters_by_group()) == 3, "a refused call must not freeze what is attached"
    one_step(meft)
    assert all(store.values.any() for store in meft.stores)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of decoder layers: need a transformers causal"):
        attach(nn.Linear(3, 3), small_config())


def test_a_layer_without_an_ffn_is_refused_and_left_alone() -> None:
    model = tiny_stack()
    for layer in model.layers:
        layer.mixer = layer.mlp
        del layer.mlp
    with pytest.raises(ValueError, match="no FFN found in _Layer .*norm, mixer.*: looked for mlp"):
        attach(model, small_config())
    assert all(p.requires_grad for p in model.parameters())


class _TwoOutputs(nn.Module):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, h


class _HiddenOutputs(nn.Module):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        both = h, h
        return both


class _Flattened(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(0, -2)


def test_an_ffn_with_two_outputs_is_refused_before_the_model_is_changed() -> None:
    """A mixture of experts may return its router's logits as well."""
    model = tiny_stack()
    model.layers[1].mlp = _TwoOutputs()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="_TwoOutputs of TinyStack returns several tensors: no adapter can stand"):
        attach(model, small_config())
    assert names == [name for name, _ in model.named_modules()] and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("ffn, returned", [(_HiddenOutputs, "tuple"), (_Flattened, r"a tensor \(12, 16\)")])
def test_an_ffn_whose_source_does_not_tell_is_refused_when_it_runs(ffn: type[nn.Module], returned: str) -> None:
    model = tiny_stack()
    model.layers[0].mlp = ffn()
    attach(model, small_config())
    with pytest.raises(ValueError, match=rf"{ffn.__name__} returns {returned}, not one tensor \(2, 6, 16\)"):
        model(tokens())


class _OnRequest(nn.Module):
    def forward(self, h: Tensor, scores: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if scores:
            return h, h
        return h


def test_an_ffn_that_returns_more_only_when_asked_is_accepted() -> None:
    model = tiny_stack()
    model.layers[0].mlp = _OnRequest()
    want = model(tokens())
    attach(model, small_config())
    assert torch.equal(model(tokens()), want)


def test_two_lists_that_could_be_the_decoder_are_refused() -> None:
    """Nothing tells which one the text goes through."""
    model = tiny_stack()
    model.tower = tiny_stack().layers
    with pytest.raises(ValueError, match="TinyStack has several lists of layers .*cannot tell the text decoder"):
        attach(model, small_config())


def test_what_a_model_calls_its_decoder_is_taken() -> None:
    """Though another list is as long and comes first."""
    model, inner = nn.Module(), tiny_stack()
    model.config, model.tower, model.inner = inner.config, tiny_stack().layers, inner
    model.get_decoder = lambda: inner
    assert decoder_layers(model) is inner.layers


class _SequentialLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(h)


def test_an_ffn_that_is_a_sequential_gets_its_adapter_beside_it() -> None:
    """nn.Sequential runs every child, so an adapter registered as one would run behind the FFN as well."""
    torch.manual_seed(0)
    model = nn.Module()
    model.config = SimpleNamespace(hidden_size=D, num_hidden_layers=1)
    model.layers = nn.ModuleList([_SequentialLayer()])
    h = torch.randn(2, 3, D)
    before = model.layers[0](h)
    attach(model, small_config())
    assert torch.equal(model.layers[0](h), before)


# ---- dtype moves, checkpointing ----

renamed_in_transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_the_store_stays_fp32_on_the_host(move) -> None:
    model = tiny_llama()
    meft = attach(model, small_config())
    kept = [p for store in meft.stores for p in store.parameters()]
    before = [p.detach().clone() for p in kept]
    move(model)
    assert next(model.parameters()).dtype != torch.float32
    for p, was in zip([p for store in meft.stores for p in store.parameters()], before, strict=True):
        assert p.dtype == torch.float32 and p.device.type == "cpu" and torch.equal(p, was)
    assert all(p is q for p, q in zip(kept, (p for s in meft.stores for p in s.parameters()), strict=True))


def test_a_bfloat16_model_trains_fp32_rows() -> None:
    model = tiny_llama().to(torch.bfloat16)
    meft = attach(model, small_config())
    one_step(meft)
    assert model(tokens()).logits.dtype == torch.bfloat16
    assert all(s.values.dtype == s.values.grad.dtype == torch.float32 and s.values.any() for s in meft.stores)


def gradients(checkpointing: bool, **options) -> tuple[list[Tensor], MeftModel]:
    model = tiny_llama().train()
    meft = attach(model, small_config(**options))
    fill_values(meft)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for seed in range(2):
        ids = tokens(seed=seed)
        next_token_loss(model(ids, use_cache=False).logits, ids).backward()
    return [p.grad for store in meft.stores for p in store.parameters() if p.requires_grad], meft


@renamed_in_transformers
@pytest.mark.parametrize("options", [{}, {"gate": "softmax", "reading": "union"}, {"gate": "none"}], ids=named)
def test_gradient_checkpointing_changes_no_gradient(options: dict) -> None:
    plain, meft = gradients(False, **options)
    recomputed, again = gradients(True, **options)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(plain, recomputed, strict=True))
    # Recomputing the forward pass fetches the rows a second time; the gradients go back once.
    assert again.link.bytes["h2d", "rows"] == 2 * meft.link.bytes["h2d", "rows"]
    assert again.link.bytes["d2h", "grads"] == meft.link.bytes["d2h", "grads"]


@renamed_in_transformers
def test_usage_counts_a_micro_batch_once_under_checkpointing() -> None:
    _, plain = gradients(False)
    _, recomputed = gradients(True)
    assert [a.usage for a in recomputed.adapters] == [a.usage for a in plain.adapters]


def test_autocast_keeps_the_adapter_in_the_hidden_states_dtype() -> None:
    model = tiny_llama().train()
    meft = attach(model, small_config())
    optimizer = meft.make_optimizer(lr=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and all(store.values.any() for store in meft.stores)
