"""Product-key memory finds the exact best rows of all, and computes and trains what the paper's formula says."""

import pytest
import torch
from meft_bench.baselines.product_keys import Options, ProductKeyMemory, attach, count

from meft_bench.train.models import load_model, shape_of

D = 16


def memory(**fields) -> ProductKeyMemory:
    made = ProductKeyMemory(D, Options(**fields), torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.values.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return made


def reference(made: ProductKeyMemory, x: torch.Tensor, query, keys, values) -> torch.Tensor:
    """Every head scores all n x n keys, each the join of two sub-keys, keeps k and adds the weighted values."""
    heads, _, n, _ = keys.shape
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        for h in range(heads):
            halves = [query[h, p] @ token for p in (0, 1)]
            joined = torch.stack([torch.cat([keys[h, 0, i], keys[h, 1, j]]) for i in range(n) for j in range(n)])
            scores = joined @ torch.cat(halves)
            top = scores.topk(min(made.kept, n * n))
            out[t] = out[t] + top.values.softmax(0) @ values[top.indices]
    return out


@pytest.mark.parametrize("fields", [{"subkeys": 6, "heads": 2, "kept": 3, "key_width": 4},
                                    {"subkeys": 5, "heads": 1, "kept": 5, "key_width": 2}])  # fmt: skip
def test_the_search_has_recall_1(fields):
    made, x = memory(**fields), torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    _, rows = made.search(x)
    n = fields["subkeys"]
    queries = torch.einsum("td,hpwd->thpw", x, made.query)
    scores = torch.einsum("thpw,hpnw->thpn", queries, made.keys)
    every = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    assert rows.shape == (20, fields["heads"], fields["kept"])
    assert torch.equal(rows.sort().values, every.topk(fields["kept"]).indices.sort().values) and rows.max() < n * n


def test_every_step_is_adamw_on_the_formula():
    # In float64: where all kept rows share a sub-key its gradient is zero, and AdamW would blow up its rounding.
    made = memory(subkeys=4, heads=2, kept=3, key_width=4).double()
    x, target = torch.randn(2, 5, D, dtype=torch.float64)
    copies = [p.detach().clone().requires_grad_() for p in (made.query, made.keys, made.values)]
    ours = torch.optim.AdamW([made.query, made.keys, made.values], lr=1e-2)
    theirs = torch.optim.AdamW(copies, lr=1e-2)
    for _ in range(3):
        got, wanted = made(x), reference(made, x, *copies)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
        for optimizer, out in ((ours, got), (theirs, wanted)):
            optimizer.zero_grad()
            (out - target).square().sum().backward()
            optimizer.step()
    for mine, copy in zip((made.query, made.keys, made.values), copies, strict=True):
        torch.testing.assert_close(mine, copy, atol=1e-7, rtol=1e-7)


def test_it_starts_at_the_base_model_and_keeps_all_of_a_small_memory():
    made = memory(subkeys=2, heads=1, kept=50, key_width=2)
    assert made(torch.randn(3, D)).shape == (3, D) and made.search(torch.randn(3, D))[1].shape == (3, 1, 4)
    base = load_model("embedded", None, "float32", "cpu").model
    ids = torch.tensor([[1, 5, 9, 30]])
    before = base(ids).logits
    attached = attach(base, Options(subkeys=3), 0)
    assert torch.equal(attached.model(ids).logits, before)
    assert attached.parameter_groups() == count(Options(subkeys=3), shape_of(base))
