"""MEFT as a method of peft. Importing this module registers it; adapter folders of it can then be loaded by anyone.

    from meft_bench import MeftConfig
    model = peft.get_peft_model(base, MeftConfig(r=8464, k=64, task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")

On a machine with a GPU, load with PeftModel.from_pretrained(base, folder, torch_device="cpu"): peft otherwise reads the
file into GPU memory on its way to the host.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from meft_bench.integrations import register
from meft_bench.integrations.peft_layer import NO_MERGE, HostAdapter, HostStore, MeftLayer
from meft_bench.meft import adapter_folder, background, hooks
from meft_bench.meft import config as core
from meft_bench.meft.adam import ROW_ADAM
from meft_bench.meft.adapter_folder import AdapterLayout
from meft_bench.meft.background import background_of
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.model import collect_gradients, look_ahead
from meft_bench.meft.sites import hidden_size, parallel_ffns
from meft_bench.train.methods import Attached

_PEFT_TYPE = register.peft_type()
_NEW_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
"""Tasks whose models begin with a head that nobody has trained."""


def _as_peft_fields() -> list[tuple[str, Any, Any]]:
    """The method's options as fields of a peft configuration: same kinds, defaults and words, peft's names of sizes."""
    options, made = {option.name: option for option in dataclasses.fields(core.MeftOptions)}, []
    for name, theirs in {**adapter_folder.SIZES, **{name: name for name in adapter_folder.CHOICES}}.items():
        option = options[theirs]
        default = None if option.default is dataclasses.MISSING else option.default
        made.append((name, option.type, field(default=default, metadata={"help": option.metadata["about"]})))
    return made


_Options: Any = dataclasses.make_dataclass("_Options", _as_peft_fields(), bases=(PeftConfig,))


@dataclass
class MeftConfig(_Options):
    """Every choice of MEFT (arXiv 2406.04984) under peft's roof; all of them go into adapter_config.json.

    r, k, n_experts and p are the paper's R, K, N and P. The other fields are those of
    meft_bench.meft.config.MeftOptions, where each is explained, and which checks them: raises ValueError for sizes that
    do not fit together. dataclasses.fields(MeftConfig) carries the same words as metadata["help"].

        config = MeftConfig(r=8464, k=64, task_type="CAUSAL_LM")       # N = 368 experts, P = 8 of them probed
        config = MeftConfig(r=3072, k=3072, key_experts=False)         # a dense Parallel Adapter
        config = MeftConfig(r=8464, **meft_bench.meft.config.PRESETS["paper"])
    """

    seed: int = field(default=0, metadata={"help": "Seed of the initial keys"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "FFN modules to adapt, as names or a pattern; None takes all of them"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "FFN modules to leave alone"})
    layout: AdapterLayout | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        if self.task_type in _NEW_HEADS:
            raise ValueError(
                f"task_type={TaskType(self.task_type).value}: MEFT trains and saves FFN neurons, and not the new head "
                'of such a task: train it as text, task_type="CAUSAL_LM"'
            )
        method = self.to_core()
        # What was left open is written down, so that a saved adapter means the same under other defaults.
        self.n_experts, self.p, self.gate = method.experts, method.probed, method.gate

    def to_core(self) -> core.MeftOptions:
        """The same choices as the method itself names them."""
        return adapter_folder.core_config(vars(self))

    @classmethod
    def from_core(cls, method: core.MeftOptions, **fields: Any) -> "MeftConfig":
        """From the method's own configuration; fields are peft's (task_type, target_modules, seed)."""
        return cls(**adapter_folder.peft_fields(method), **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as they are written into adapter_config.json."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layout"}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """The configuration in a folder or hub repository, once its weights' header agrees with it.

        Raises ValueError for a folder with links, pickles, missing files, or tensors other than the ones claimed.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        layout = adapter_folder.check_folder(folder) if folder.is_dir() else None
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if layout is None and isinstance(config, MeftConfig):
            hub = {"subfolder": subfolder, **cls._split_kwargs(kwargs)[0]}
            layout = _hub_layout(pretrained_model_name_or_path, config, hub)
        if isinstance(config, MeftConfig):
            config.layout = layout
        return config


def _hub_layout(repository: str, config: MeftConfig, hub: dict[str, Any]) -> AdapterLayout:
    try:
        path = hf_hub_download(repository, adapter_folder.WEIGHTS_NAME, **hub)
    except EntryNotFoundError as error:
        raise ValueError(
            f"no {adapter_folder.WEIGHTS_NAME} in {repository} ({type(error).__name__}); pickles are never read"
        ) from None
    method, weights, targets = config.to_core(), Path(path), config.target_modules
    if isinstance(targets, str):
        raise ValueError(f"{repository}: target_modules is a pattern, not a list of names")
    return AdapterLayout(repository, method, adapter_folder.check_weights(weights, method), weights, targets)


class MeftTuner(BaseTuner):
    """peft's tuner for MEFT: every targeted FFN becomes a MeftLayer; get_peft_model makes one."""

    prefix = register.PREFIX
    tuner_layer_cls = MeftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # By a call and not by model.forward, which peft 0.20 uses: only a call runs the hook that knows the mask.
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by peft around every forward and generate, with what it knows of adapters' arguments."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names= is not supported: MEFT runs one adapter over a whole batch; call set_adapter(name) and "
                "hand over the rows of each adapter as a batch of their own"
            )
        yield

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Resolve which FFNs are meant and check that they fit, before anything is made."""
        names = wrapped_ffn_names(self.model)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(names)
        chosen = [name for name in names if check_target_module_exists(peft_config, name)]
        foreign = [
            name
            for name, _ in self.model.named_modules()
            if name not in names and ".meft_store" not in name and check_target_module_exists(peft_config, name)
        ]
        if foreign or not chosen:
            raise ValueError(
                f"target_modules must name whole FFNs such as {names[0]}; "
                + (f"{foreign[0]} is none" if foreign else f"{peft_config.target_modules} matches none")
            )
        peft_config.target_modules = set(chosen)
        if peft_config.layout is not None:
            peft_config.layout.check_model(self.model)
        training = not peft_config.inference_mode
        adapter_folder.require_host_memory(peft_config.to_core(), hidden_size(self.model), len(chosen), training)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        batch = next((m.batch for m in model.modules() if isinstance(m, MeftLayer)), None)
        if batch is None:
            batch = BatchInfo()
            hooks.watch(model, batch)
        self._batch = batch
        self._link = Resident() if peft_config.placement == "device" else Link()
        # Layers draw from one stream in order, as meft_bench.meft.model.attach does: equal seeds start equal.
        self._random_state = torch.Generator().manual_seed(peft_config.seed).get_state()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        method, batch = peft_config.to_core(), self._batch
        device = next(self.model.parameters()).device if method.placement == "device" else torch.device("cpu")
        generator = torch.Generator()
        generator.set_state(self._random_state)
        store = HostStore(method, hidden_size(self.model), generator, device)
        self._random_state = generator.get_state()
        layer = target if isinstance(target, MeftLayer) else MeftLayer(target, batch)
        layers = len(peft_config.target_modules)
        layer.add(adapter_name, HostAdapter(method, store, self._link, batch, layers))
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            setattr(parent, target_name, layer)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        # A copy, for what is resolved on this model: the caller may use the configuration for another, with other FFNs.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        made = super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [module for module in model.modules() if isinstance(module, MeftLayer)]
        adapters: list[MeftAdapter] = [m.adapters[adapter_name] for m in layers if adapter_name in m.adapters]
        look_ahead(adapters, adapters[0].config.lookahead if adapters else 0)
        return made

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own also moves the new module's weight to where the old one's was; an FFN has no weight of its own.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)


def wrapped_ffn_names(model: nn.Module) -> list[str]:
    """Module names of the decoder's FFNs; the model may be without weights. Raises ValueError for a model whose FFN is
    not one module, or returns several tensors."""
    names = {id(module): name for name, module in model.named_modules()}
    sites = parallel_ffns(model)
    if any(site.entry is not site.exit for site in sites):
        raise ValueError(
            f"{type(model).__name__} keeps its FFN as loose matrices in the layer, which peft cannot wrap: "
            "use meft_bench.meft.model.attach in code, or another method, such as parallel_adapter"
        )
    return [names[id(site.entry)] for site in sites]


register.register(MeftConfig, MeftTuner)


def meft_layers(model: nn.Module) -> list[MeftLayer]:
    """The adapted FFNs of a model, in order. Raises ValueError when it has none."""
    layers = [module for module in model.modules() if isinstance(module, MeftLayer)]
    if not layers:
        raise ValueError("the model has no MEFT adapter: wrap it with peft.get_peft_model(model, MeftConfig(r=...))")
    return layers


def active_adapters(model: nn.Module) -> list[HostAdapter]:
    """The adapter of every layer that is active now. Raises ValueError unless exactly one adapter name is active."""
    layers = meft_layers(model)
    names = sorted({name for layer in layers for name in layer.active_adapters if name in layer.adapters})
    if len(names) != 1:
        raise ValueError(
            f"exactly one MEFT adapter must be active, found {', '.join(names) or 'none'}: set_adapter(...)"
        )
    return [layer.adapters[names[0]] for layer in layers if names[0] in layer.adapters]


def make_optimizer(model: nn.Module, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """AdamW over the active adapter's rows as its adam field says; settings are betas, eps, weight_decay.

    Its moments lie beside the rows, and its zero_grad clears gradients in place. With adam="dense" any
    torch optimizer over model.parameters() that is not fused follows the same trajectory; "lazy" needs this one.

        optimizer = make_optimizer(model, lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    """
    adapters = active_adapters(model)
    core_config = adapters[0].config
    settings.setdefault("moments", core_config.moments)
    return ROW_ADAM[core_config.adam]([adapter.store for adapter in adapters], lr=lr, **settings)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ over the active adapter, at the cost of the rows that have a gradient; returns the
    norm before clipping (scalar). torch's own does the same at the cost of all rows."""
    adapters = active_adapters(model)
    collect_gradients(adapters)
    return clip_grad_norm([adapter.store for adapter in adapters], max_norm)


def count_background(model: nn.Module, texts: Iterable[Sequence[int]] | None = None) -> int:
    """What distinctive updates need before training: count in how many texts (lists of token ids; None: texts that the
    base writes by itself) each neuron of the active adapter is used; returns the number of texts.

        model = peft.get_peft_model(base, MeftConfig(r=1536, k=8, distinctive=96))
        count_background(model, tokenizer(open("background.txt").read().splitlines())["input_ids"])
    """
    return background.count_background(model, active_adapters(model), texts)


def attach(model: nn.Module, options: core.MeftOptions | MeftConfig, seed: int) -> Attached:
    """model as a PeftModel with one MEFT adapter, as the harness's methods hand it over; save writes peft's folder.

        attached = attach(model, MeftConfig(r=64, k=16), seed=0)
        attached.save("adapter")

    Raises ValueError for a model whose FFNs cannot be found and sizes that do not fit.
    """
    config: Any = options if isinstance(options, MeftConfig) else MeftConfig.from_core(options)
    config = dataclasses.replace(config, seed=seed, task_type=config.task_type or "CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    adapters = active_adapters(peft_model)
    groups: dict[str, list[nn.Parameter]] = {}
    for adapter in adapters:
        adapter.usage = []  # the harness keeps them all
        for name, parameter in adapter.store.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(name, []).append(parameter)
    link = adapters[0].link
    return Attached(
        model=peft_model,
        groups=groups,
        optimizer_factory=functools.partial(make_optimizer, peft_model),
        clip=functools.partial(clip_grad_norm_, peft_model),
        adds_gradients=True,
        link=link if isinstance(link, Link) else None,
        usage=[adapter.usage for adapter in adapters],
        save=peft_model.save_pretrained,
        background=background_of(peft_model, adapters),
    )
