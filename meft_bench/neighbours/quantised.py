"""MEFT's rows in int8 and int4 by group of 32 in host memory: bytes, tokens a second and scores beside fp32's."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meft_bench.neighbours.finding import Finding, extent

NUMERICS = 1
TITLE = "Efficient LLM Inference on CPUs"
PAPER = "2311.00502"
CLAIM = "Weights in INT4 stay within 1 % of FP32's accuracy, at 20 to 80 ms a token on one Xeon."
TESTED = "Neurons of a trained adapter in int8 and int4 (groups of 32) in host memory, by generate --rows, beside fp32."
MINUTES = 4
USES = ("meft", "facts", "training", "evaluation", "bench", "embedded")
ROWS = ("fp32", "int8", "int4")
_SEEDS = (0, 1, 2)
_WIDE = {"hidden": 4096, "neurons": 8464, "kept": 64}
"""One layer of the paper's largest 7B adapter."""
_TOKENS = (1, 16)
_ROUNDS = 7
_PROMPTS, _NEW_TOKENS = 64, 8


def run(quick: bool) -> dict[str, Any]:
    """Scores and answers of adapters that are trained here, seconds of generating, and seconds of a wide layer."""
    trained = [_trained(seed, quick) for seed in (_SEEDS[:1] if quick else _SEEDS)]
    return {
        "evidence": "measured",
        "scores": [_scored(*one) for one in trained],
        "generate": _generated(*trained[0][:2], quick),
        "layer": [_layer(tokens, quick) for tokens in _TOKENS],
    }


# ---- an adapter of the embedded model ----


def _trained(seed: int, quick: bool) -> tuple[Any, Any, Any]:
    """(loaded base with MEFT at 10 % trained on it inside peft, the task, the spec), as the full suite trains it."""
    import torch

    from meft_bench.harness import evaluation
    from meft_bench.harness.rates import swept_rate
    from meft_bench.harness.rows import row_options
    from meft_bench.harness.spec import RunSpec
    from meft_bench.harness.suites import EMBEDDED_TASKS
    from meft_bench.integrations.peft_method import attach
    from meft_bench.train import loop, models
    from meft_bench.train.methods import parse_options

    size: dict[str, Any] = dict(EMBEDDED_TASKS["facts"])
    if quick:
        size |= {"train_rows": 20, "eval_rows": 6, "steps": 3, "batch_size": 8}
    rate = swept_rate("meft", "10%", "facts")
    assert rate is not None
    spec = RunSpec(method="meft", options=row_options("meft", "10%", "embedded"), seed=seed, learning_rate=rate,
                   splits=("test",), **size)  # fmt: skip
    torch.manual_seed(seed)
    task = evaluation.load_task(spec, None)
    loaded = models.load_model("embedded", None, spec.dtype, spec.device)
    attached = attach(loaded.model, parse_options("meft", spec.options), seed)
    examples = loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter)
    loop.train(attached, spec, loop.shuffled(attached, examples, spec, loaded.tokenizer.pad_token_id))
    return (loaded, attached.model.eval()), task, spec


def _forms(model: Any) -> dict[str, Any]:
    """The model with its rows in every form; fp32 is itself."""
    import copy

    from meft_bench.integrations.quantised_rows import quantise_rows

    return {rows: model if rows == "fp32" else quantise_rows(copy.deepcopy(model), rows) for rows in ROWS}


def _stores(model: Any) -> list[Any]:
    from meft_bench.integrations.peft_method import meft_layers

    return [adapter.store for layer in meft_layers(model) for adapter in layer.adapters.values()]


def _scored(on_base: tuple[Any, Any], task: Any, spec: Any) -> dict[str, Any]:
    """Score by form, how many answers are right in one form alone, and bytes of rows and routers."""
    from meft_bench.harness import evaluation
    from meft_bench.harness.spec import HEADLINE_METRIC
    from meft_bench.meft.quantised import host_bytes

    loaded, model = on_base
    items, found = {}, {}
    for rows, form in _forms(model).items():
        scores = evaluation.evaluate_split(form, loaded.tokenizer, task, "test", loaded.max_length)
        items[rows] = scores.scores[HEADLINE_METRIC[spec.task]]
        found[rows] = {"score": round(statistics.fmean(items[rows]), 6), "host_bytes": host_bytes(_stores(form))}
    for rows in ROWS:
        found[rows]["changed"] = sum(a != b for a, b in zip(items[rows], items["fp32"], strict=True))
    return {"seed": spec.seed, "n": len(items["fp32"]), "forms": found}


def _generated(on_base: tuple[Any, Any], task: Any, quick: bool) -> dict[str, Any]:
    """Seconds of answering the same prompts, every form once a round."""
    from meft_bench.bench import common
    from meft_bench.finetune.generate import greedy
    from meft_bench.train import tokens

    loaded, model = on_base
    prompts = [doc["prompt"] for doc in task.test_docs()][: 2 if quick else _PROMPTS]
    fed = tokens.prompt_ids(loaded.tokenizer, prompts)

    def answer(form: Any) -> None:
        # No stop: every form writes as many tokens.
        greedy(form, loaded.tokenizer, fed, _NEW_TOKENS, loaded.max_length, [])

    made = len(fed) * _NEW_TOKENS
    calls = {rows: functools.partial(answer, form) for rows, form in _forms(model).items()}
    return {"tokens": made, **_timed(calls, made, 1 if quick else _ROUNDS, common)}


def _timed(calls: Mapping[str, Callable[[], Any]], tokens: int, rounds: int, common: Any) -> dict[str, Any]:
    times = common.timed_rounds(calls, rounds)
    return {
        "times_s": {rows: common.rounded(times[rows]) for rows in ROWS},
        "tokens_per_s": {rows: round(tokens / common.median(times[rows]), 1) for rows in ROWS},
        "of_fp32": {rows: common.ratios(times["fp32"], times[rows]) for rows in ROWS[1:]},
    }


# ---- one wide layer ----


def _layer(tokens: int, quick: bool) -> dict[str, Any]:
    """Seconds of one adapter layer of a 7B model for a micro-batch of this many tokens, every form once a round."""
    import torch

    from meft_bench.bench import common
    from meft_bench.meft.batch import BatchInfo
    from meft_bench.meft.config import MeftOptions
    from meft_bench.meft.layer import MeftAdapter
    from meft_bench.meft.link import Link
    from meft_bench.meft.quantised import QuantisedAdapter, row_bytes
    from meft_bench.meft.store import NeuronStore

    sizes = {"hidden": 64, "neurons": 144, "kept": 8} if quick else _WIDE
    config = MeftOptions(neurons=sizes["neurons"], kept=sizes["kept"])
    store = NeuronStore(config, sizes["hidden"], torch.Generator().manual_seed(0), common.CPU)
    with torch.no_grad():
        store.values.copy_(store.keys)
    plain = MeftAdapter(config, store, Link(), BatchInfo()).eval()
    forms = {rows: plain if rows == "fp32" else QuantisedAdapter(plain, rows) for rows in ROWS}
    generator, h = torch.Generator().manual_seed(1), [torch.empty(0)]

    def fresh() -> None:
        h[0] = torch.randn(1, tokens, sizes["hidden"], generator=generator)

    def compute(adapter: Any) -> None:
        with torch.no_grad():
            adapter(h[0])

    calls = {rows: functools.partial(compute, adapter) for rows, adapter in forms.items()}
    times = common.timed_rounds(calls, 1 if quick else _ROUNDS, before=fresh)
    return {
        **sizes,
        "tokens": tokens,
        "row_bytes": {rows: row_bytes(sizes["hidden"], rows) for rows in ROWS},
        "times_s": {rows: common.rounded(times[rows]) for rows in ROWS},
        "layer_s": {rows: round(common.median(times[rows]), 6) for rows in ROWS},
        "of_fp32": {rows: common.ratios(times["fp32"], times[rows]) for rows in ROWS[1:]},
    }


# ---- what came out ----


def findings(found: dict[str, Any]) -> list[Finding]:
    """Scores and bytes, then speed, of each form."""
    return [
        *(_of_scores(found["scores"], rows) for rows in ROWS[1:]),
        *(_of_speed(found, rows) for rows in ROWS[1:]),
    ]


def _of_scores(scores: Sequence[dict[str, Any]], rows: str) -> Finding:
    mean = {form: statistics.fmean(s["forms"][form]["score"] for s in scores) for form in ("fp32", rows)}
    host_bytes = {form: scores[0]["forms"][form]["host_bytes"] for form in ("fp32", rows)}
    changed, n = sum(s["forms"][rows]["changed"] for s in scores), sum(s["n"] for s in scores)
    says = (
        f"{rows}: {100 * host_bytes[rows] / host_bytes['fp32']:.0f} % of the host bytes, routers in fp32 among them; "
        f"score {mean[rows]:.4f} (fp32 {mean['fp32']:.4f}), {changed} of {n:,} answers right in one of the two alone"
    )
    differences = [s["forms"][rows]["score"] - s["forms"]["fp32"]["score"] for s in scores]
    return Finding(says=says, evidence="measured", n=len(scores), of="seeds", interval=extent(differences),
                   covers="difference of scores, lowest to highest seed", digits=4)  # fmt: skip


def _of_speed(found: dict[str, Any], rows: str) -> Finding:
    made, layers = found["generate"], found["layer"]
    one = "; ".join(
        f"{layer['tokens']} token{'s' * (layer['tokens'] > 1)}: {1e3 * layer['layer_s'][rows]:.2f} ms "
        f"(fp32 {1e3 * layer['layer_s']['fp32']:.2f})"
        for layer in layers
    )
    sizes = f"D = {layers[0]['hidden']:,}, R = {layers[0]['neurons']:,}"
    says = (
        f"{rows}: the embedded model writes {made['tokens_per_s'][rows]:,.0f} tokens/s (fp32 "
        f"{made['tokens_per_s']['fp32']:,.0f}); a layer of {sizes} for {one}"
    )
    ratios = layers[0]["of_fp32"][rows]
    return Finding(says=says, evidence="measured", n=len(ratios), of="rounds", interval=extent(ratios),
                   covers="speed of the layer at 1 token, in that of fp32, lowest to highest")  # fmt: skip
