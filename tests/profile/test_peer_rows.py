"""Simulated rows of the peers: what crosses, what is kept, and what stands in for peft's sparse sum."""

import pytest
import torch
from meft_bench.baselines import shira

from meft_bench.profile.shira import densely
from meft_bench.profile.simulated_row import Setting, simulated_row
from meft_bench.profile.variants import VARIANTS, size_options
from meft_bench.simulate import cards
from meft_bench.train.counts import Counted
from meft_bench.train.models import load_model
from tests.profile.small import shape_of_config, small_config, small_spec


@pytest.fixture(scope="module")
def rows() -> dict:
    config = small_config(layers=2)
    setting = Setting(config=config, shape=shape_of_config(config), card=cards.card("12GB"), host=cards.host("desktop"))
    names = ("full", "full_lsp_offload", "shira")
    return {name: simulated_row(small_spec(name), setting)[0] for name in names}


def test_lsp_moves_two_d_squared_of_every_matrix(rows):
    # All matrices are 256 wide at their smaller side, and d is no larger than that.
    squares = 4 * 2 * 7 * 256**2
    assert rows["full_lsp_offload"]["traffic"]["link_bytes"] == {"d2h grads": squares, "h2d updates": squares}
    held = [rows[name]["memory"]["device_peak_bytes"] for name in ("full_lsp_offload", "full")]
    entries = 4 * rows["shira"]["parameters"]["trainable"]  # an allocator's blocks are a little larger
    assert rows["shira"]["memory"]["by_category"]["adapter parameters"] == pytest.approx(entries, rel=0.01)
    assert held[0] < held[1] / 1.5 and rows["full_lsp_offload"]["memory"]["host_peak_bytes"] > 2 * squares


def test_rows_say_whether_their_update_is_adamws():
    assert VARIANTS["product_keys"].exact and VARIANTS["shira"].exact
    assert not VARIANTS["full_galore"].exact and not VARIANTS["full_lsp_offload"].exact


def test_peers_train_as_much_as_the_adapter(rows):
    config = small_config(layers=2)
    counted, wanted = Counted(config), 2 * 1000 * 256 * 2
    for name in ("shira", "product_keys"):
        options = size_options(VARIANTS[name], 1000, counted)
        found = counted.trainable(name, shira.Options(**options)) if name == "shira" else None
        if found is None:
            from meft_bench.baselines import product_keys

            found = counted.trainable(name, product_keys.Options(**options))
            assert options["subkeys"] > 10
        assert found == pytest.approx(wanted, rel=0.05)


def test_the_dense_sum_is_pefts_sparse_one():
    ids = torch.tensor([[1, 5, 9, 30]])
    found = []
    for change in (lambda model: None, densely):
        attached = shira.attach(load_model("embedded", None, "float32", "cpu").model, shira.Options(rank=2), 0)
        with torch.no_grad():
            for entries in attached.parameters():
                entries.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        change(attached.model)
        out = attached.model(ids).logits
        out.square().sum().backward()
        found.append((out.detach(), [p.grad for p in attached.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
