"""FusionAI trains over slow networks. How slow may the link between a card and the memory it trains from be?

Every method of the profile, replayed behind PCIe 5, 4 and 3 and behind networks of 100, 10 and 1 Gbit/s, as if the host
memory were another machine's. Half speed is half of the method's own speed with a link that takes no time.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meft_bench.neighbours.finding import Finding, extent

if TYPE_CHECKING:
    from meft_bench.profile.setting import Setting

NUMERICS = 1
TITLE = "FusionAI"
PAPER = "2309.01172"
CLAIM = (
    "Consumer GPUs joined by slow networks can train: by its performance analysis 50 RTX 3080 reach throughputs "
    "comparable to those of 4 H100."
)
TESTED = (
    "At which link between card and host memory each method still trains at half of its speed with a link that takes "
    "no time: PCIe 5, 4 and 3, 100, 10 and 1 GbE (7B shape, a card of the 24 GB class, 8 micro-batches of 2 x 256)."
)
MINUTES = 5
USES = ("meft", "budgets", "parallel_adapter", "parallel_adapter_offload", "adapter_h", "lora", "full", "galore",
        "lomo", "adalomo", "lsp_offload", "product_keys", "shira", "profile", "simulator")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is replayed."""

    model: str = "llama-7b"
    card: str = "24GB"
    host: str = "desktop"
    neurons: int = 3072
    batch: int = 2
    length: int = 256
    accumulation: int = 8
    variants: tuple[str, ...] = ()
    """All that train, where none is named."""


_QUICK = Sizes(model="tiny", neurons=64, length=16, accumulation=1,
               variants=("parallel_adapter", "parallel_adapter_streamed", "meft"))  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    from meft_bench.profile.variants import VARIANTS

    sizes = _QUICK if quick else Sizes()
    names = sizes.variants or tuple(v.name for v in VARIANTS.values() if not v.untrained)
    jobs = [(name, sizes) for name in names]
    if quick:
        rows = [_replayed(*job) for job in jobs]
    else:
        from meft_bench.profile.pool import Pool

        with Pool({}, None) as pool:
            rows = [row for _, row in pool.each(_replayed, jobs, "links")]
    return {"evidence": "simulated", "settings": {**dataclasses.asdict(sizes), "union": "assumed"},
            "methods": sorted(rows, key=lambda row: names.index(row["variant"]))}  # fmt: skip


def _replayed(name: str, sizes: Sizes) -> dict[str, Any]:
    from meft_bench.profile import links
    from meft_bench.profile.matrix import UnionSource
    from meft_bench.profile.spec import ProfileSpec
    from meft_bench.profile.variants import VARIANTS

    (union,) = UnionSource(log=None).unions(VARIANTS[name], sizes.model, sizes.batch * sizes.length, sizes.neurons)
    spec = ProfileSpec(
        model=sizes.model, variant=name, neurons=sizes.neurons, batch=sizes.batch, seq=sizes.length, union=union
    )
    row = links.speeds(spec, _setting(sizes))
    return {
        **row,
        "slowest": links.slowest(row["tokens_per_s"]),
        "needed_bytes_per_s": links.needed(row["tokens_per_s"]),
    }


def _setting(sizes: Sizes) -> "Setting":
    import torch
    from transformers import LlamaConfig

    from meft_bench.profile import shapes
    from meft_bench.profile.setting import Setting
    from meft_bench.simulate import cards
    from meft_bench.train.models import shape_of

    if sizes.model == "tiny":
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256
        )
    else:
        config = shapes.model_config(sizes.model)
    shape = shape_of(shapes.build(config, "meta", torch.bfloat16, random=False))
    return Setting(config=config, shape=shape, card=cards.card(sizes.card), host=cards.host(sizes.host),
                   accumulations=(sizes.accumulation,))  # fmt: skip


# ---- what came out ----

HEADLINE = ("meft", "meft_budget_100", "parallel_adapter_streamed", "parallel_adapter_zero3",
            "parallel_adapter_host_optimizer_gradients", "full_lomo")  # fmt: skip
"""Methods with a sentence of their own, where they were replayed."""


def findings(found: dict[str, Any]) -> list[Finding]:
    from meft_bench.simulate.nodes import LINKS

    rows = found["methods"]
    made = [Finding(
        says=f"Of {len(rows)} methods still train at half of their speed or more: " + ", ".join(
            f"{sum(_good(row, name) for row in rows)} behind {link.title}" for name, link in LINKS.items()) + ".",
        evidence="simulated", n=len(rows), of="methods")]  # fmt: skip
    made += [_sentence(row) for name in HEADLINE for row in rows if row["variant"] == name]
    needed = [row["needed_bytes_per_s"] / 1e9 for row in rows
              if row["family"] == "meft" and row["needed_bytes_per_s"] is not None]  # fmt: skip
    if needed:
        says = "What a variant of MEFT needs of the link to train at half speed, where a link of the six gives it."
        made.append(Finding(says=says, evidence="simulated", n=len(needed), of="variants of MEFT",
                            interval=extent(needed), covers="GB/s, least to most"))  # fmt: skip
    return made


def _good(row: dict[str, Any], link: str) -> bool:
    from meft_bench.profile.links import FREE, SHARE

    return bool(row["tokens_per_s"][link] >= SHARE * row["tokens_per_s"][FREE])


def _sentence(row: dict[str, Any]) -> Finding:
    from meft_bench.profile.links import FREE
    from meft_bench.simulate.nodes import LINKS

    speeds, needed = row["tokens_per_s"], row["needed_bytes_per_s"]
    shares = [speeds[name] / speeds[FREE] for name in LINKS]
    where = f"down to {LINKS[row['slowest']].title}" if row["slowest"] else "behind none of the six"
    about = "" if not needed else f" (it takes about {needed / 1e9:.2g} GB/s)"
    return Finding(says=f"{row['title']} trains at half speed {where}{about}.", evidence="simulated", n=len(LINKS),
                   of="links", interval=extent(shares), covers="share of its speed without a link's time, lowest to "
                   "highest")  # fmt: skip
