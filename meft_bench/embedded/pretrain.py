"""The embedded base model: a small LLaMA pretrained on people, needs and sums disjoint from every task.

It ships in meft_bench/embedded/ so that nobody waits for it; `make base` rebuilds it from RECIPE below, on one thread
and one seed, and writes the record beside it. Its size is chosen so that adapters on the FFN can work at all: narrower
or shorter-trained bases have no attention that carries a name to the answer's position.
"""

import functools
import hashlib
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meft_bench.tasks import world as w
from meft_bench.train import loop
from meft_bench.train.methods import Attached

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """Everything that decides the embedded base's weights."""

    hidden_size: int = 128
    layers: int = 4
    ffn_size: int = 384
    heads: int = 4
    max_length: int = 64
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    share_tools: float = 0.15
    share_sums: float = 0.3
    seed: int = 0
    stored_dtype: str = "float16"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, one per digit; spaces are kept as a mark on the word, so decoding gives back the text."""
    pieces = [*_SPECIAL, "▁", *"0123456789", *(f"▁{word}" for word in w.World().vocabulary())]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tok.decoder = decoders.Metaspace(prepend_scheme="always")
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=BaseRecipe.max_length,
    )


def build_model(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model of the recipe, seeded."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class BaseText:
    """The base's pretraining text: every template of every task, but only the base's own people, needs and sums."""

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe, self.rng, world = recipe, random.Random(f"base text {recipe.seed}"), w.World()
        self.names = world.first
        self.facts = world.people_facts("base", None, recipe.seed)
        self.needs = world.need_facts("base_needs", None, recipe.seed)

    def fact(self) -> str:
        fact = self.rng.choice(self.facts)
        group = self.rng.choice((w.QUESTIONS, w.FRAMES))
        return f"{self.rng.choice(group[fact.attribute]).format(n=fact.subject)} {fact.answer}"

    def tool(self) -> str:
        needs = self.rng.sample(self.needs, self.rng.choice((1, 2)))
        query = " and ".join(n.subject for n in needs)
        return f"{self.rng.choice(w.TOOL_TEMPLATES).format(q=query)} {' , '.join(n.answer for n in needs)}"

    def sum(self) -> str:
        """Half symbolic, half in the words of the two forms that no task trains on in isolation."""
        a, b, op = w.draw_sum(self.rng, held_out=False)
        forms = (w.ADD_TEMPLATES if op == "+" else w.SUB_TEMPLATES)[:2]
        text = w.SYMBOLIC[op] if self.rng.random() < 0.5 else self.rng.choice(forms)
        return f"{text.format(a=a, b=b, n=self.rng.choice(self.names))} {w.solve(a, b, op)}"

    def batch(self) -> list[str]:
        size = self.recipe.batch_size
        tools, sums = round(size * self.recipe.share_tools), round(size * self.recipe.share_sums)
        return [
            *(self.tool() for _ in range(tools)),
            *(self.sum() for _ in range(sums)),
            *(self.fact() for _ in range(size - tools - sums)),
        ]


def pretrain(recipe: BaseRecipe) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict]:
    """Train the base on one thread; returns model, tokenizer and the record (losses, tokens, seconds)."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model, text = build_model(recipe, tokenizer), BaseText(recipe)
    trained = list(model.parameters())
    adamw = functools.partial(torch.optim.AdamW, trained, betas=recipe.betas, fused=True)
    start = time.perf_counter()
    with tqdm(total=recipe.steps, desc="pretraining the embedded base", unit="step", mininterval=2) as bar:
        _, log = loop.train(
            Attached(model, {"base": trained}, adamw),
            recipe,
            lambda step: _batch(model, tokenizer, text.batch()),
            on_step=lambda done, log: bar.update(done - bar.n),
        )
    record = {
        "losses_every_100_steps": [round(loss, 4) for loss in log.loss[99::100]],
        "tokens": sum(log.tokens_supervised),
        "train_s": round(time.perf_counter() - start, 1),
    }
    return model, tokenizer, record


def _batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> loop.Batch:
    """The mean next-token loss over texts, shorter and longer half apart to save padding."""
    texts = sorted((f"{t}</s>" for t in texts), key=lambda t: t.count(" "))
    half = len(texts) // 2
    parts = [
        tokenizer(part, padding=True, padding_side="right", return_tensors="pt")
        for part in (texts[:half], texts[half:])
    ]
    count = sum(int(part["attention_mask"][:, 1:].sum()) for part in parts)

    def loss(part: BatchEncoding) -> Tensor:
        labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, loop.IGNORED)
        return model(**part, labels=labels, use_cache=False, num_items_in_batch=count).loss

    return loop.Batch(
        losses=[functools.partial(loss, part) for part in parts],
        real=sum(int(part["attention_mask"].sum()) for part in parts),
        padded=sum(part["input_ids"].numel() for part in parts),
        supervised=count,
    )


def build_base(recipe: BaseRecipe, folder: Path) -> dict:
    """Pretrain and write model, tokenizer and record.json (recipe, record, sha256 of the weights) into folder. Raises
    OSError, before it trains, for one that cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    model, tokenizer, record = pretrain(recipe)
    model.to(getattr(torch, recipe.stored_dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **record,
    }
    (folder / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return record
