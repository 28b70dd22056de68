"""Simulated rows of the peers: what crosses, what is kept, and what stands in for peft's sparse sum."""

import pytest
import torch
from meft_bench.baselines import adalomo, lsp_offload, shira

from meft_bench.profile import shapes
from meft_bench.profile.setting import Setting
from meft_bench.profile.shira import densely
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.step import training_step
from meft_bench.profile.variants import VARIANTS, size_options
from meft_bench.simulate import cards
from meft_bench.train.counts import Counted
from meft_bench.train.models import load_model
from meft_bench.train.step_bytes import Step
from tests.profile.small import VOCABULARY, shape_of_config, small_config, small_spec


@pytest.fixture(scope="module")
def rows() -> dict:
    config = small_config(layers=1)
    setting = Setting(config=config, shape=shape_of_config(config), card=cards.card("12GB"), host=cards.host("desktop"))
    names = ("full", "full_lomo", "full_adalomo", "full_lsp_offload", "shira")
    return {name: simulated_row(small_spec(name), setting)[0] for name in names}


def test_lsp_moves_two_d_squared_of_every_matrix(rows):
    # All matrices are 256 wide at their smaller side, and d is no larger than that.
    squares = 4 * 7 * 256**2
    told = rows["full_lsp_offload"]["traffic"]
    assert told["link_bytes"] == {"d2h grads": squares, "h2d updates": squares}
    assert (told["d2h_bytes_per_update"], told["h2d_bytes_per_update"]) == (squares, squares)
    ids = 8 * 2 * 64  # of a micro-batch; what it brings back are the loss and the like
    for count, step in told["by_accumulation"].items():
        assert step["h2d_bytes_per_step"] == squares + int(count) * ids
        assert 0 <= step["d2h_bytes_per_step"] - squares < int(count) * 64
    held = [rows[name]["memory"]["device_peak_bytes"] for name in ("full_lsp_offload", "full")]
    entries = 4 * rows["shira"]["parameters"]["trainable"]  # an allocator's blocks are a little larger
    assert rows["shira"]["memory"]["by_category"]["adapter parameters"] == pytest.approx(entries, rel=0.01)
    assert held[0] < held[1] / 1.5 and rows["full_lsp_offload"]["memory"]["host_peak_bytes"] > 2 * squares


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_lsps_own_count_is_the_closed_formula_whatever_the_accumulation(micro_batches):
    """Real steps, d = 100: of 256 x 256 and 256 x 688."""
    model = shapes.build(small_config(layers=2), "cpu", torch.float32, random=True)
    options = lsp_offload.Options(subspace=100, rounds=1)
    attached = lsp_offload.attach(model, options, 0)
    optimizer = attached.make_optimizer(lr=1e-4, weight_decay=0.0)
    for _ in range(2):
        attached.link.reset()
        training_step(attached, optimizer, small_spec("full", seq=8, accumulation=micro_batches), VOCABULARY, "cpu")
        squares = 4 * 2 * 7 * 100**2
        assert dict(attached.link.bytes) == {("d2h", "grads"): squares, ("h2d", "updates"): squares}


@pytest.mark.parametrize("name", ["full_lomo", "full_adalomo", "full_lsp_offload"])
def test_gradients_are_used_within_the_last_backward_pass_alone(rows, name):
    """One micro-batch more takes a plain one's time; those before the last leave their gradients on the device."""
    memory, step_s = rows[name]["memory"], rows[name]["time"]["step_s_by_accumulation"]
    more, whole = memory["accumulated"], rows["full"]["memory"]["after_step"]["kept_gradients_bytes"]
    assert memory["device_peak_bytes"] + whole / 3 < more["device_peak_bytes"] <= memory["device_peak_bytes"] + whole
    held = rows["full"]["memory"]
    assert held["device_peak_bytes"] < held["accumulated"]["device_peak_bytes"] <= held["device_peak_bytes"] + whole
    plain = rows["full"]["time"]["step_s_by_accumulation"]
    if name != "full_lsp_offload":  # which trains the matrices alone
        assert (step_s["16"] - step_s["4"]) / 12 == pytest.approx((plain["16"] - plain["4"]) / 12, rel=1e-3)
    assert step_s["1"] > plain["1"] and (step_s["16"] - step_s["4"]) / 12 < step_s["1"]


def test_adalomos_row_is_its_baselines(rows):
    """Its state is the baseline's closed formula; the old stand-in had neither step counts nor gradients' norms."""
    config, about = small_config(layers=1), rows["full_adalomo"]
    assert about["modelled"] == "" and about["size"] == {}
    step = Step(shape=shape_of_config(config), tokens=128, dtype="bfloat16", vocabulary=VOCABULARY)
    state = adalomo.state_bytes(adalomo.Options(), step).device["moments"]
    blocks = 512 * (2 * 7 + 7)  # an allocator's block is at most 512 bytes larger than what it holds
    assert state <= about["memory"]["by_category"]["moments"] <= state + blocks
    assert about["parameters"]["trainable"] == rows["full"]["parameters"]["trainable"]


def test_rows_say_whether_their_update_is_adamws():
    assert VARIANTS["product_keys"].exact and VARIANTS["shira"].exact
    for name in ("full_galore", "full_lsp_offload", "full_lomo", "full_adalomo", "parallel_adapter_adam8bit"):
        assert not VARIANTS[name].exact


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
