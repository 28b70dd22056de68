"""Every figure: its name, its caption, and the function that draws it. Equal records, equal bytes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from meft_bench.harness.suites import MORE_SEEDS, SEEDS
from meft_bench.report.figures import bench as bench_figures
from meft_bench.report.figures import cost, frontier, output, size, sparsity, sweeps
from meft_bench.report.records.results import Results

_PLAN = (
    f"Planned: {len(SEEDS)} seeds ({len(SEEDS) + len(MORE_SEEDS)} for the contrasts of Table 1, 1 for the adapter "
    "offloaded whole), up to 600 test items each; the panel's title says what is drawn and how it came to be "
    "(its evidence)."
)
_MEASURED = "Measured on finished runs; the title says over how many seeds."
_POINTS = (
    "A large filled marker is the mean over seeds, its bar the 95 % interval over the pooled items, a small dot one "
    "seed's mean: where dots spread wider than the bar, seeds matter more than items."
)
_PAPER = (
    "The paper's numbers stand in a panel of their own, with open markers: reported, about 501 items, one run each."
)
FIGURES: dict[str, tuple[str, str]] = {
    "figure1": (
        "Figure 1: score against trainable parameters",
        "Closed-book facts (ours, left) and Natural Questions (the paper's, right) against trainable parameters in per "
        "cent of the base model, for LoRA, AdapterH, Parallel Adapter and MEFT, with the levels of full fine-tuning "
        "and of the base model. Light: controls the paper lacks (LoRA with alpha growing with rank, LoRA on "
        f"the FFN, AdapterH that starts at identity). {_PLAN} {_POINTS} {_PAPER} Compare the shape of the curves and "
        "the order of the methods, never the heights: model, task and scale differ.",
    ),
    "sizes_by_task": (
        "Table 2 as a figure: which tasks need size",
        "The Parallel Adapter at four sizes on our four tasks, each named with the paper's task it stands for, and the "
        f"paper's Table 2 beside it. {_PLAN} {_POINTS} {_PAPER} A line that rises with size marks a task that needs "
        "room for knowledge, a flat one a task that does not. Metrics differ between tasks, so heights do not compare.",
    ),
    "pareto": (
        "Score against device memory and against trainable parameters",
        "Every row and size of Table 1 on facts. Above: against the bytes a method holds on the device for training, "
        "accounted from sizes and counted transfers, not an allocator's peak; the base model, the same for all, and "
        "activations are left out. Below: against trainable parameters. Up and to the left is better, the broad grey "
        "line joins the rows that no row of the same size or smaller beats; a method that "
        f"stands further left above than below gains from living on the host. {_PLAN} {_POINTS}",
    ),
    "capacity": (
        "Knowledge held: bits per trainable parameter, and recall",
        "Left: bits of the taught facts that training questions get back (recall times facts times 10 bits), per "
        "trainable parameter. Right: the recall itself. Each fact is seen equally often whatever their number, and "
        "every number has the learning rate that was swept at 900. A curve "
        f"of bits that goes flat while recall falls is full. {_PLAN} {_POINTS}",
    ),
    "figure2": (
        "Figure 2: how concentrated the Parallel Adapter's activation is",
        "Cumulative share of a layer's mean activation against the share of its neurons, most active first; one line a "
        "layer, mean over seeds, on training rows of facts. The dotted diagonal is a layer that uses all neurons "
        "alike: the further a line bends above it, the more concentrated. Written in: the share of neurons above zero "
        "for one token, and the share of a token's activation in its own top 5 %, which can be high although the "
        f"mean is spread, when tokens use different neurons. {_MEASURED} The paper prints no values.",
    ),
    "figure3": (
        "Figure 3: the data path of one MEFT layer",
        "A drawing of what crosses the link between device and host, with the bytes that the run of MEFT at 10 % on "
        "facts counted for each purpose, per optimizer step and summed over layers, and their share of all bytes. "
        f"{_MEASURED} Hidden states, their router gradient, indices and scores grow with the tokens of the batch, rows "
        "and their gradients with the union of neurons; at this model's size the tokens weigh more than at 7B.",
    ),
    "figure4": (
        "Figure 4: with and without Key-Experts",
        "Left: MEFT at 10 % with and without Key-Experts on the four tasks. Right, on facts: the two things that "
        "Key-Experts change, taken apart. The search decides which neurons a token may keep, the gate multiplies a "
        "neuron's activation by its expert's score. Steep lines mean that the search matters, lines far apart that the "
        f"gate does. {_PLAN} {_POINTS} The paper's figure prints no values.",
    ),
    "ablations": (
        "Ablations of MEFT on facts",
        "Each ablation's test score minus that of MEFT of the same size, task and seed (of MEFT without Key-Experts, "
        "where the ablation changes that); left of zero is worse. The large marker is the mean of the differences, its "
        f"bar the 95 % t-interval over seeds (wide, with three), a small dot one seed. {_PLAN} A bar that crosses zero "
        "decides nothing.",
    ),
    "figure5": (
        "Figure 5: latency of a training step by variant",
        "Time of one training step for five variants: MEFT, without Key-Experts, without sparse transfer, without "
        "both, and the resident Parallel Adapter; medians by part, the total with its lowest and highest repeat. "
        "Evidence, settings and machine stand in the figure, from results/bench/step.json. Compare the order of "
        "the variants with the paper's, which is given in words since it prints no values.",
    ),
    "figure6": (
        "Figure 6: score against K",
        "Facts against the neurons kept a token, without Key-Experts, at two sizes (left), and the paper's Figure 6 "
        f"(right). The last point of a line keeps every neuron: the dense Parallel Adapter. {_PLAN} {_POINTS} {_PAPER} "
        "A line that is flat from some K on says that the rest of the neurons is not needed for a token.",
    ),
    "figure7": (
        "Figure 7: score against the number of experts",
        "Facts against N at equal candidates a token (left), so that only the grain of the search changes, and the "
        f"paper's Figure 7 (right). {_PLAN} {_POINTS} {_PAPER} The paper's two largest N were probably run with other "
        "settings than its text says.",
    ),
    "figure8": (
        "Figure 8: neurons a micro-batch moves",
        "U/R, the share of a layer's neurons that some token of the micro-batch keeps, against the number of sequences "
        "in the micro-batch, by their length, for three sizes of the trained MEFT (mean over layers), and by layer for "
        f"one length. Dotted: K/R, what one token keeps. {_MEASURED} U/R, not K/R, decides the traffic: the closer a "
        "curve comes to 1, the less sparse transfer saves. Few tokens against many neurons (150 %) is nearest to 7B.",
    ),
    "rows_moved": (
        "Rows moved by layer while training",
        "U/R of the micro-batches of training on facts, mean over the run, by layer and size of MEFT; dotted in the "
        f"same colour its K/R. {_MEASURED} The distance between a line and its dotted level is what the union over "
        "tokens costs.",
    ),
    "accumulation": (
        "Traffic per optimizer step under gradient accumulation",
        "Numbers (hidden states, rows, gradients) that cross the link per optimizer step, in units of M, the "
        "trainable keys and values, when its 64 rows are cut into 1, 4 or 16 micro-batches. Dashed: the paper's 0.56 M "
        "(reported) times the micro-batches; dotted: 2 M, what moving all weights down and accumulated gradients up "
        f"once would take. {_MEASURED} A line above the dotted one moves more than that simple scheme. MEFT at 10 % "
        "lies high because the batch's hidden states outweigh so small an adapter.",
    ),
    "figure9": (
        "Figure 9: timeline of one training step",
        "What host, link and device do during one step of MEFT, from results/bench/step.json, where evidence and "
        "settings are given; Figure 3 says what the copies carry. A gap in a lane is waiting. Bars that overlap "
        "between lanes would be work that is hidden; where none do, every part adds to the step.",
    ),
    "lookahead": (
        "Pre-retrieval: selecting neurons one layer early",
        "Share of the neurons a token truly keeps that selecting from the layer before finds (the paper's appendix A), "
        f"by layer. Dotted: K/R, what a random choice would find. {_MEASURED} What is not found has to be fetched "
        "later, or is missing.",
    ),
    "experts": (
        "Experts and neurons in use",
        "Left: entropy of the kept neurons over experts, 1 if all are used alike. Right: the share of neurons that no "
        "token of the probed training rows keeps. By layer, for sizes, starts of the router and numbers of experts. "
        f"{_MEASURED} Low entropy or many dead neurons mean that part of the adapter is unused.",
    ),
    "forgetting": (
        "Forgetting of what the base knew",
        "Loss on fresh draws of the base model's own pretraining text after training on facts, above the base's own "
        f"loss, in nats per token. {_MEASURED} Further right is more forgotten; the number on the right is the mean. "
        "Read it beside Table 1 and the swept learning rates, which were chosen for the score: a row that learnt "
        "little may forget little, and a higher rate forgets more.",
    ),
    "frontier": (
        "Who learns the facts and forgets least",
        "Share of the taught facts that are answered in wordings that were not trained, against the loss on the base "
        "model's own text above the base's. One curve a method, a point for each learning rate (mean over seeds, a "
        "small dot one seed); further left is less forgotten, higher more learnt. Panels from above: equal trainable "
        "parameters; equal bytes on the device; MEFT at growing sizes (markers); peers, which the paper does not "
        "compare with. MEFT updates all neurons in use, or only those most distinctive of the new facts. Full "
        "fine-tuning is in every panel. The sentence at the foot is computed from the records; the claim on "
        "distinctive updates has its verdict under Every claim.",
    ),
    "kernels": (
        "Kernels of the host against memory bandwidth",
        "Time of one call against R at equal rows touched, beside packages that do the same work and plain torch, from "
        "results/bench/kernels.json, where evidence and machine are given. Dotted: the bytes a kernel must move at the "
        "rate that torch.add reached over as many bytes in the same rounds; a kernel on that line is as fast as this "
        "memory. The search also computes, so its line may lie above for that reason.",
    ),
    "retrieval": (
        "Finding a token's neurons: with and without Key-Experts",
        "Time of the whole search (router, best experts, their keys, best neurons, union) for one micro-batch against "
        "R, at two hidden sizes, from results/bench/retrieval.json, where evidence and machine are given. The power of "
        "R is fitted to every round and its median written in, beside that of the dot products, which are counted.",
    ),
}
"""Name -> (title, caption), in the order of the report."""
_DRAWN: dict[str, Callable[[Results, dict[str, Any], dict[str, Any]], Any]] = {
    "figure1": size.figure1,
    "sizes_by_task": size.sizes_by_task,
    "pareto": size.pareto,
    "capacity": size.capacity,
    "figure2": sparsity.figure2,
    "figure3": cost.figure3,
    "figure4": sweeps.figure4,
    "ablations": sweeps.ablations,
    "figure5": cost.figure5,
    "figure6": sweeps.figure6,
    "figure7": sweeps.figure7,
    "figure8": sparsity.figure8,
    "rows_moved": sparsity.rows_moved,
    "accumulation": cost.accumulation,
    "figure9": cost.figure9,
    "lookahead": sparsity.lookahead,
    "experts": sparsity.experts,
    "forgetting": sweeps.forgetting,
    "frontier": frontier.frontier,
    "kernels": bench_figures.kernels,
    "retrieval": bench_figures.retrieval,
}


def draw(
    results: Results, reported: dict[str, Any], bench: dict[str, Any], names: Iterable[str] | None = None,
    formats: Sequence[str] = ("png",), curves: Results | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """File name -> content of every figure (or of those named) in these formats (png, svg). curves: the results of the
    suite frontier, which its figure is of."""
    files: dict[str, bytes] = {}
    with output.settings():
        for name in _DRAWN if names is None else names:
            found = (curves or Results([], {})) if name == "frontier" else results
            files |= output.save(name, _DRAWN[name](found, reported, bench), formats)
    return files
