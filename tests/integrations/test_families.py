"""Every family of decoders: a method stands at the right modules of the text decoder, or says no before it starts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from meft_bench.integrations import peft_method
from meft_bench.integrations.peft_layer import MeftLayer
from meft_bench.meft.sites import ADAPTER_NAME
from meft_bench.train.methods import Attached, find_method, parse_options
from meft_bench.train.projections import ATTENTION_QV, projections
from tests.families import FAMILIES, LAYERS, REFUSED, VOCABULARY, Family

MEFT: dict[str, Any] = {"neurons": 8, "experts": 2, "probed": 2, "kept": 8}
METHODS: dict[str, dict[str, Any]] = {
    "meft": MEFT,
    "peft": MEFT,
    "parallel_adapter": {"neurons": 4},
    "parallel_adapter_offload": {"neurons": 4},
    "adapter_h": {"size": 3, "start": "identity"},
    "lora": {"rank": 2, "targets": "all"},
}
ZERO_AT_FIRST = ("values", "up", "lora_b")


def attach(name: str, model: nn.Module, seed: int = 0, **options: Any) -> Attached:
    given = {**METHODS[name], **options}
    if name == "peft":
        return peft_method.attach(model, parse_options("meft", given), seed)
    return find_method(name).attach(model, parse_options(name, given), seed)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def own_names(attached: Attached, method: str) -> set[str]:
    """Where the method's modules are, by the base's own names."""
    marks = {"meft": ADAPTER_NAME, "peft": "meft_store", "adapter_h": "serial_adapter", "lora": "lora_A"}
    mark = marks.get(method, ADAPTER_NAME)
    found = {name.split(f".{mark}")[0] for name, _ in attached.model.named_modules() if f".{mark}" in name}
    return {name.removeprefix("base_model.model.") for name in found}


def expected_names(family: Family, method: str) -> set[str]:
    layers = [f"{family.layers}.{number}" for number in range(LAYERS)]
    if method in ("meft", "parallel_adapter", "parallel_adapter_offload"):
        return set(layers)
    parts = {"peft": [family.ffn], "adapter_h": family.linears.split()}[method]
    return {f"{layer}.{part}" for layer in layers for part in parts}


def snapshot(model: nn.Module) -> Any:
    modules = [(name, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def check(attached: Attached, model_before: Tensor, weights: dict[str, Tensor]) -> None:
    """No-op at first; then every trained tensor gets a gradient, and the output moves; the base stays."""
    with torch.no_grad():
        assert torch.equal(logits(attached.model), model_before)
        for name in ZERO_AT_FIRST:
            for parameter in attached.groups.get(name, []):
                parameter.normal_(0, 0.3)
    own = {id(p) for p in attached.parameters()}
    out = logits(attached.model.train())
    targets = torch.randint(3, VOCABULARY, out.shape[:-1], generator=torch.Generator().manual_seed(1))
    F.cross_entropy(out.flatten(0, 1), targets.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
    assert not any(p.requires_grad for p in attached.model.parameters() if id(p) not in own)
    attached.model.eval()
    with torch.no_grad():
        assert not torch.allclose(logits(attached.model), model_before)
    left = {id(p): p for p in attached.model.parameters() if id(p) not in own}
    assert len(left) == len(weights) and all(any(torch.equal(p, w) for w in weights.values() if w.shape == p.shape)
                                             for p in left.values())  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_stands_at_the_text_decoder_or_says_no(kind: str, method: str) -> None:
    family = FAMILIES[kind]
    model = family.model()
    with torch.no_grad():
        before = logits(model)
    if method in family.refuses:
        untouched = snapshot(model)
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
            attach(method, model)
        assert snapshot(model) == untouched
        return
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    attached = attach(method, model)
    if method != "lora":
        assert own_names(attached, method) == expected_names(family, method)
    check(attached, before, weights)


def lora_parts(family: Family, targets: str) -> set[str]:
    names = set()
    for number in range(LAYERS):
        dense = number == 0 and family.dense_linears is not None
        linears = family.dense_linears if dense else family.linears
        ffn = [*(linears or "").split(), *([] if dense else family.experts.split())]
        attention = family.qv.split() if targets == "attention" else [*family.qv.split(), *family.attention.split()]
        parts = {"attention": attention, "ffn": ffn, "all": [*attention, *ffn]}[targets]
        names |= {f"{family.layers}.{number}.{part}" for part in parts}
    return names


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("targets", ["attention", "ffn", "all"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_lora_adapts_the_named_matrices_and_no_others(kind: str, targets: str) -> None:
    """By the deltas: a matrix is adapted exactly when its merged value differs from the base's."""
    family = FAMILIES[kind]
    base = {name: p.detach().clone() for name, p in family.model().named_parameters()}
    attached = attach("lora", family.model(), targets=targets)
    with torch.no_grad():
        for parameter in attached.groups["lora_b"]:
            parameter.normal_(0, 0.3)
    merged = attached.model.merge_and_unload()  # type: ignore[operator]
    changed = {name.removesuffix(".weight") for name, p in merged.named_parameters() if not torch.equal(p, base[name])}
    assert changed == lora_parts(family, targets)


def test_linear_attention_counts_as_attention_but_not_as_query_and_value() -> None:
    kinds = ["linear_attention", "full_attention"]
    found = projections(Family("qwen3_next", fields={"layer_types": kinds}).model())
    linear = {f"model.layers.0.linear_attn.{part}" for part in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
    full = {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}
    assert set(found["attention"]) == linear | full
    assert found[ATTENTION_QV] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert all(".shared_expert." in name for name in found["ffn"]) and len(found["ffn"]) == 3 * LAYERS


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_text_decoder_of_its_own_is_refused_untouched(kind: str) -> None:
    family, message = REFUSED[kind]
    model = family.model()
    untouched = snapshot(model)
    for method in family.refuses:
        with pytest.raises(ValueError, match=rf"\A[^\n]*({message})[^\n]*\Z"):
            attach(method, model)
        assert snapshot(model) == untouched
    full = find_method("full").attach(model, parse_options("full", {}), 0)
    assert full.parameter_groups() == {"base": sum(p.numel() for p in model.parameters())}


def test_an_adapter_of_the_text_decoder_takes_padding_from_the_mask() -> None:
    model = FAMILIES["llava"].model()
    attached = attach("peft", model)
    ids, mask = torch.randint(3, VOCABULARY, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :3] = 0
    attached.model.train()(input_ids=ids, attention_mask=mask).logits.sum().backward()
    layers = [m for m in attached.model.modules() if isinstance(m, MeftLayer)]
    assert len(layers) == LAYERS and [tokens for usage in attached.usage for tokens, _ in usage] == [7] * LAYERS


# What a method draws at random: equal for equal seeds, layer by layer another.
DRAWN = {"meft": "keys", "peft": "keys", "parallel_adapter": "keys", "parallel_adapter_offload": "keys",
         "adapter_h": "down", "lora": "lora_a"}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_alone_decides_what_a_method_starts_with(method: str) -> None:
    def start(seed: int, before: int) -> list[Tensor]:
        model = FAMILIES["llama"].model()
        torch.manual_seed(before)  # what ran earlier in the process
        return [p.detach().clone() for p in attach(method, model, seed).groups[DRAWN[method]]]

    first, again, other = start(3, before=1), start(3, before=2), start(4, before=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(p.flatten().tolist()) for p in first}) == len(first)


@pytest.mark.parametrize("start", ["normal", "identity"])
def test_adapter_h_starts_as_it_says(start: str) -> None:
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        before = logits(model)
        attached = attach("adapter_h", model, start=start, size=64)
        assert torch.equal(logits(attached.model), before) is (start == "identity")
    assert all(0.018 < float(p.detach().std()) < 0.022 for p in attached.groups["down"])
    assert all(bool(p.any()) is (start == "normal") for p in attached.groups["up"])


def test_the_scale_of_lora() -> None:
    """alpha / rank: 16 / rank as released, 2 as a control."""
    scales = {}
    for rank in (2, 8):
        for alpha in ("fixed", "rank"):
            attached = attach("lora", FAMILIES["llama"].model(), rank=rank, alpha=alpha)
            found = {m.scaling["default"] for m in attached.model.modules() if isinstance(m, LoraLayer)}
            scales[rank, alpha] = found.pop()
            assert not found and {p.shape[0] for p in attached.groups["lora_a"]} == {rank}
    assert scales == {(2, "fixed"): 8, (8, "fixed"): 2, (2, "rank"): 2, (8, "rank"): 2}
