"""Models and adapters small enough to train in milliseconds. D = 16, R = 24, N = 6, P = 2, K = 5 unless asked."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link
from meft_bench.meft.model import MeftModel
from meft_bench.meft.store import NeuronStore

D, VOCAB, LAYERS = 16, 50, 2

# Every way to gate, and no Key-Experts at all.
GATES = [{"gate": "score"}, {"gate": "softmax"}, {"gate": "none"}, {"key_experts": False}]


def named(options: dict) -> str:
    """A pytest id from configuration fields."""
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def small_config(**changes) -> MeftOptions:
    return MeftOptions(**{"neurons": 24, "experts": 6, "probed": 2, "kept": 5, **changes})


class _FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h)))


class _Layer(nn.Module):
    """A decoder layer whose "attention" is the mean over the past: cheap, causal, and tokens depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), _FFN()

    def forward(self, h: Tensor) -> Tensor:
        places = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None].to(h.dtype)
        h = h + h.cumsum(1) / places
        return h + self.mlp(self.norm(h))


class TinyStack(nn.Module):
    """A two-layer decoder with what attach looks for: a config, a list of layers, an mlp in each."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=D, num_hidden_layers=LAYERS)
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.head = nn.Linear(D, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def tiny_stack(seed: int = 0) -> TinyStack:
    torch.manual_seed(seed)
    return TinyStack()


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": 2 * D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.2,  # at the usual 0.02 so small a model says the same token whatever it reads
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def fill_values(meft: MeftModel, seed: int = 1, size: float = 0.3) -> None:
    """Random values: at the zero init neither keys nor router would get a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for store in meft.stores:
            store.values.copy_(size * torch.randn(store.values.shape, generator=generator))


def make_adapter(config: MeftOptions, mask: Tensor | None = None, seed: int = 0) -> MeftAdapter:
    """One layer's adapter with random values; mask [B, length] is the micro-batch's attention mask."""
    generator = torch.Generator().manual_seed(seed)
    store = NeuronStore(config, D, generator, torch.device("cpu"))
    with torch.no_grad():
        store.values.copy_(torch.randn(store.values.shape, generator=generator))
    return MeftAdapter(config, store, Link(), BatchInfo(mask))


def hidden(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """Hidden states [B, length, D]."""
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """Token numbers [B, length], none of them the padding 0."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
