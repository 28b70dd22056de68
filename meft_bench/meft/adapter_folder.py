"""Saved adapters of MEFT: a folder in peft's format, adapter_config.json and adapter_model.safetensors.

The one writer and the one reader of the method alone; peft's save_pretrained and from_pretrained (integrations/) make
and take the same files. A saved adapter is data from a stranger: what its folder may hold is checked before any memory
is taken for it.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from meft_bench.meft import files
from meft_bench.meft.config import FIELDS, MeftOptions
from meft_bench.meft.files import named
from meft_bench.meft.sites import find_ffns, hidden_size
from meft_bench.meft.store import NeuronStore
from meft_bench.text import printable
from meft_bench.write import replace

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST_CONFIG = 1 << 20
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.meft_store\.(?P<part>keys|values|router)")
_OTHERS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "exclude_modules": (list, str),
    "inference_mode": (bool,),
    "task_type": (str,),
    "base_model_name_or_path": (str,),
    "revision": (str,),
}
_BY_PEFT = "peft.PeftModel.from_pretrained loads adapters of some layers, and of a base whose vocabulary was resized"
_NESTED = re.compile(r"\)\s*[*+{]")

# peft's field -> the method's own name for the same size.
SIZES = {"r": "neurons", "k": "kept", "n_experts": "experts", "p": "probed"}
CHOICES = tuple(name for name in FIELDS if name not in SIZES.values())


# ---- writing ----


def write(folder: Path, config: MeftOptions, stores: Mapping[str, NeuronStore]) -> None:
    """Write the rows of each adapted FFN, by its module name, into folder (made if missing)."""
    tensors = {
        f"base_model.model.{ffn}.meft_store.{part}": parameter.detach().cpu().contiguous()
        for ffn, store in stores.items()
        for part, parameter in store.named_parameters()
    }
    about = {"peft_type": "MEFT", "task_type": "CAUSAL_LM", "inference_mode": True, "target_modules": sorted(stores)}
    replace(folder / WEIGHTS_NAME, save(tensors, {"format": "pt"}))
    replace(folder / CONFIG_NAME, (json.dumps({**about, **peft_fields(config)}, indent=2) + "\n").encode())


def peft_fields(config: MeftOptions) -> dict[str, Any]:
    """The configuration under peft's field names."""
    sizes = {ours: getattr(config, theirs) for ours, theirs in SIZES.items()}
    return {**sizes, **{name: getattr(config, name) for name in CHOICES}}


def ffn_names(model: nn.Module) -> list[str]:
    """Module names of the decoder's FFNs (of an FFN of several modules, the first), in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(site.entry)] for site in find_ffns(model)]


# ---- reading ----


def read(folder: Path, choices: Mapping[str, Any], model: nn.Module) -> tuple[MeftOptions, list[dict[str, Tensor]]]:
    """(the configuration with these choices on top, the tensors of each FFN of model by name, in order).

    Raises ValueError for what check_folder and AdapterLayout.check_model refuse, and for an adapter of some FFNs only;
    FileNotFoundError for a missing file.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file() and not (folder / PICKLE_NAME).exists():
            raise FileNotFoundError(f"no {name} in {printable(folder)}: give the folder that MeftModel.save wrote")
    layout = check_folder(folder)
    config, names = MeftOptions.from_dict({**layout.config.to_dict(), **choices}), ffn_names(model)
    dataclasses.replace(layout, config=config).check_model(model)
    if lacking := [name for name in names if name not in layout.widths]:
        raise ValueError(
            f"{printable(folder)} leaves {lacking[0]} out: load it on the base it was trained on; {_BY_PEFT}"
        )
    if read_embeddings(layout.weights):
        raise ValueError(f"{printable(folder)} holds embeddings of a resized base: {_BY_PEFT}")
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in files.read_safetensors(layout.weights).items():
        match = _KEY.fullmatch(name)
        assert match is not None
        tensors[match["layer"]][match["part"]] = tensor
    return config, list(tensors.values())


def core_config(fields: Mapping[str, Any]) -> MeftOptions:
    """The method's configuration from peft's field names. Raises ValueError for sizes that do not fit together."""
    r = fields.get("r")
    if r is None:
        raise ValueError("MeftConfig needs r, the neurons added to every FFN (e.g. r=8464)")
    if isinstance(r, int) and r >= 1 << 31:
        raise ValueError(f"r={r} is not a size: neurons are numbered with 31 bits")
    given = {theirs: fields[ours] for ours, theirs in SIZES.items() if ours in fields}
    if "kept" in given and given["kept"] is None:
        raise ValueError("k=None: set k, the neurons kept per token (k=r keeps all)")
    try:
        return MeftOptions(**given, **{name: fields[name] for name in CHOICES if name in fields})
    except ValueError as error:
        raise ValueError(f"{error} (neurons is r, kept is k, experts is n_experts, probed is p)") from None


@dataclass(frozen=True)
class AdapterLayout:
    """What a checked folder holds: the width D of each adapted FFN, by module name, and the configuration."""

    folder: str
    config: MeftOptions
    widths: dict[str, int]
    weights: Path
    targets: Collection[str] | None = None
    """The FFNs that the configuration names, as peft matches names; None for all."""

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless the folder holds exactly the FFNs of model that its configuration names, at model's
        width, memory suffices for the rows, and every number of them is finite."""
        present = set(ffn_names(model))
        width = hidden_size(model)
        foreign = sorted(set(self.widths) - present)
        wrong = sorted(name for name, found in self.widths.items() if found != width)
        if foreign or wrong:
            raise ValueError(
                f"{self.folder} was trained on another model: it adapts {printable((foreign or wrong)[0])} at width "
                f"{self.widths[(foreign or wrong)[0]]}; this model has {len(present)} FFNs of width {width}"
            )
        chosen = {name for name in present if self._targeted(name)}
        self._check_embeddings(model)
        if lacking := [f"{name}.{part}" for name in chosen - set(self.widths) for part in _parts(self.config)]:
            raise ValueError(f"{self.weights} lacks {named(lacking)}: copy the whole file, or train the adapter again")
        if unasked := sorted(set(self.widths) - chosen):
            raise ValueError(f"{self.weights} holds rows of {unasked[0]}, which target_modules does not name")
        require_host_memory(self.config, width, len(self.widths), training=False)
        files.check_finite_file(self.weights, "the training diverged or the file is damaged; take another adapter")

    def _check_embeddings(self, model: nn.Module) -> None:
        """peft saves the embeddings of a base whose vocabulary was resized, and puts them into the base on loading."""
        own = _embeddings_of(model)
        for name, shape in read_embeddings(self.weights).items():
            if name not in own:
                raise ValueError(f"{self.weights} holds a tensor that is not a MEFT adapter's: {printable(name)}")
            if shape != own[name]:
                raise ValueError(
                    f"{self.folder} was trained with {printable(name)} {shape}; this model's is {own[name]}: call "
                    f"model.resize_token_embeddings({shape[0]}) before loading it"
                )

    def _targeted(self, name: str) -> bool:
        return self.targets is None or any(name == t or name.endswith(f".{t}") for t in self.targets)


def host_bytes(config: MeftOptions, width: int, layers: int, training: bool) -> int:
    """Host memory of one adapter in bytes: fp32 rows and router; in training their gradients and two moments too."""
    rows = 2 * config.neurons + (config.experts or 0) * config.key_experts
    return rows * width * layers * 4 * (4 if training else 1)


def require_host_memory(config: MeftOptions, width: int, layers: int, training: bool) -> None:
    """Raises ValueError when the adapter would not fit into the memory that is free now."""
    from meft_bench.host_memory import available_bytes  # which asks psutil; attaching an adapter needs torch alone

    needed, free = host_bytes(config, width, layers, training), available_bytes()
    if config.placement == "host" and needed > free:
        purpose = "training (rows, gradients, two moments)" if training else "its rows"
        raise ValueError(
            f"MEFT with r={config.neurons} on {layers} layers of width {width} needs {needed / 2**30:,.1f} GiB of host "
            f"memory for {purpose}, {free / 2**30:,.1f} GiB are free: lower r or free memory"
        )


def check_folder(folder: Path) -> AdapterLayout:
    """Read a local adapter folder's description and the header of its weights; no tensor is loaded.

    Raises ValueError for links, pickles, pipes and devices, missing files, and for weights whose names, shapes or
    dtypes are not those the description claims.
    """
    _check_entries(folder)
    (config, targets), weights = _read_config(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    return AdapterLayout(str(folder), config, check_weights(weights, config), weights, targets)


def _check_entries(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not _in_hub_cache(entry):
            raise ValueError(f"{printable(entry)} is a symbolic link: an adapter folder may hold plain files only")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            hint = f"; {PICKLE_NAME} is a pickle and is never read" if (folder / PICKLE_NAME).exists() else ""
            raise ValueError(f"no {name} in {folder}{hint}: give the folder that save_pretrained wrote")


def _in_hub_cache(link: Path) -> bool:
    """The hub's own cache keeps files as snapshots/<revision>/<name> -> ../../blobs/<digest>."""
    return link.parent.parent.name == "snapshots" and link.resolve().parent == (
        link.parent.resolve().parent.parent / "blobs"
    )


def _read_config(path: Path) -> tuple[MeftOptions, list[str] | None]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it is larger than {_LARGEST_CONFIG} bytes")
        fields = files.read_json(path, _LARGEST_CONFIG)
        if fields.get("peft_type") != "MEFT":
            raise ValueError("its peft_type is not MEFT")
        targets = fields.get("target_modules")
        if isinstance(targets, str):
            raise ValueError("target_modules is a pattern, not a list of names")
        if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
            raise ValueError(f"target_modules is {type(targets).__name__}, and must be a list of names")
        config = core_config(fields)
        _check_others(fields)
        return config, targets
    except (ValueError, TypeError) as error:  # TypeError: of a list where a text is wanted
        raise ValueError(f"{path} does not describe a MEFT adapter: {printable(error)}") from None


def _check_others(fields: Mapping[str, Any]) -> None:
    """peft's own fields and the seed, which nothing else checks. Raises ValueError."""
    for name, kinds in _OTHERS.items():
        value = fields.get(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{name} is {type(value).__name__}, and must be {kinds[0].__name__}")
    if "seed" in fields and fields["seed"] is None:
        raise ValueError("seed is null, and must be int")
    if isinstance(excluded := fields.get("exclude_modules"), str) and _NESTED.search(excluded):
        raise ValueError("exclude_modules repeats a group: a pattern that may never end; name the modules in a list")
    for name, value in fields.items():
        if isinstance(value, int | float) and not -(2**63) <= value < 2**63:  # NaN is not, either
            raise ValueError(f"{printable(name)} is no finite number below 2^63")


def check_weights(path: Path, config: MeftOptions) -> dict[str, int]:
    """The width of each adapted FFN by module name, from the header of a safetensors file alone."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in files.read_header(path).items():
        match = _KEY.fullmatch(name)
        if match is None and _may_be_embedding(name, dtype, shape):
            continue  # whether it is this model's is known when there is one
        if match is None:
            raise ValueError(f"{path} holds a tensor that is not a MEFT adapter's: {printable(name)}")
        if dtype != "F32":
            raise ValueError(f"{path}: {printable(name)} is {dtype}, MEFT's rows are F32")
        layers.setdefault(match["layer"], {})[match["part"]] = shape
    if not layers:
        raise ValueError(f"{path} holds no tensor")
    rows = _parts(config)
    for layer, found in layers.items():
        width = next(iter(found.values()))[-1] if next(iter(found.values())) else 0
        for part in sorted(set(rows) | set(found)):
            if part not in found:
                raise ValueError(f"{path} lacks {part} of {printable(layer)}")
            if part not in rows:
                raise ValueError(f"{path} holds {part} of {printable(layer)}, which this configuration does not have")
            if found[part] != (rows[part], width):
                raise ValueError(
                    f"{path}: {part} of {printable(layer)} has shape {found[part]}, not {(rows[part], width)}"
                )
    return {layer: found["values"][1] for layer, found in layers.items()}


def read_embeddings(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without peft's prefix, of what lies beside the rows in a file that check_weights let pass."""
    header = files.read_header(path)
    beside = {name: tensor.shape for name, tensor in header.items() if _KEY.fullmatch(name) is None}
    return {name.removeprefix("base_model.model."): tuple(shape) for name, shape in beside.items()}


def _may_be_embedding(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and dtype in ("F32", "F16", "BF16") and len(shape) == 2


def _embeddings_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the input and output embeddings' weights by their names in a transformers model."""
    own = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if any(module is one for one in own)
    }


def _parts(config: MeftOptions) -> dict[str, int]:
    """The tensors of one layer, and the rows of each."""
    rows = {"keys": config.neurons, "values": config.neurons}
    if config.key_experts:
        assert config.experts is not None
        rows["router"] = config.experts
    return rows
