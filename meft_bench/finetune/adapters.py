"""Saved adapters: written whole, read as data only.

A folder holds the adapter's weights (safetensors), adapter.json {format, method, options, base, shapes} and, written by
train.py, training.json and README.md. MEFT and LoRA are in peft's format, so that PeftModel.from_pretrained reads the
folder too; full fine-tuning is a model folder of transformers. An adapter may come from a stranger: links, foreign
files, broken headers and claimed sizes that the file does not hold are refused before memory is taken, and nothing is
ever unpickled.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from meft_bench.harness import models
from meft_bench.harness.methods import Attached, ModelShape, find_method, parse_options
from meft_bench.meft.files import check_tensors, read_safetensors

FORMAT = 1
CHAT_TEMPLATE = "chat_template.jinja"
ABOUT, WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS = (
    "adapter.json",
    "adapter.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_READ = (".safetensors", ".json", ".md", ".jinja", ".txt")
_LARGEST_JSON = 64 * 2**20
_LARGEST_HEADER = 100 * 2**20
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SAMPLE = 64
IN_PEFT_FORMAT = ("meft", "lora")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that an adapter belongs to."""

    source: str
    """A folder, a hub id or "embedded"."""
    revision: str | None
    shape: dict[str, int]
    fingerprint: str
    """See fingerprint()."""


def base_of(model: nn.Module, source: str, revision: str | None) -> Base:
    """Identity of a base before anything is attached to it."""
    return Base(source=source, revision=revision, shape=asdict(models.shape_of(model)), fingerprint=fingerprint(model))


def fingerprint(model: nn.Module) -> str:
    """First 12 hex digits over every parameter's name, shape and first and last values in bfloat16; the same for the
    same weights loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(ends.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def attach(model: nn.Module, method: str, options: dict[str, Any], seed: int) -> Attached:
    """The method on the base, as it will be saved: MEFT inside a PeftModel, the others as the harness attaches them."""
    parsed = parse_options(method, options)
    if method == "meft":
        from meft_bench.integrations.peft_method import attach as attach_meft

        return attach_meft(model, parsed, seed)
    return find_method(method).attach(model, parsed, seed)


# ---- writing ----


def save(folder: Path, attached: Attached, method: str, options: dict[str, Any], base: Base, tokenizer: Any) -> None:
    """Write the adapter into the empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[int]] = {}
    model: Any = attached.model
    if method == "full":
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif method in IN_PEFT_FORMAT:
        # "auto" would ask the hub whether the vocabulary was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        tensors = {name: p.detach().cpu().contiguous() for name, p in _own(attached).items()}
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        save_file(tensors, folder / WEIGHTS)
    about = {"format": FORMAT, "method": method, "options": options, "base": asdict(base), "shapes": shapes}
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _own(attached: Attached) -> dict[str, nn.Parameter]:
    """The method's tensors by their names in the model."""
    trained = {id(p) for p in attached.parameters()}
    return {name: p for name, p in attached.model.named_parameters() if id(p) in trained}


# ---- reading ----


def read_about(folder: Path) -> dict[str, Any]:
    """adapter.json of a folder whose files are only what may be read. Raises ValueError or FileNotFoundError."""
    check_folder(folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"no {ABOUT} in {folder}: give the folder that meft-bench train wrote")
    about = read_json(folder / ABOUT)
    try:
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
        Base(**about["base"])
        ModelShape(**about["base"]["shape"])
        if not isinstance(about["options"], dict) or not isinstance(about["shapes"], dict):
            raise TypeError("options and shapes must be objects")
        about["method"] + ""
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} is not an adapter description: {error}") from None
    return about


def check_folder(folder: Path) -> None:
    """Raises ValueError for a link or a file that is neither safetensors nor text, FileNotFoundError for no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {folder}")
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue  # what git and the hub's client keep; never opened here
        if file.is_symlink():
            raise ValueError(f"{file} is a link: an adapter folder must hold the files themselves; copy them")
        if file.is_dir() or file.suffix not in _READ:
            raise ValueError(f"{file} does not belong in an adapter folder: only safetensors and JSON are read")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a bounded size. Raises ValueError."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; no adapter description is that large")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return found


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of a safetensors file, from its header alone. Raises ValueError unless names, shapes and byte
    ranges agree with each other and with the file's size."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"its header claims {length:,} bytes of {size:,}")
            header = json.loads(file.read(length))
        shapes = {n: tuple(about["shape"]) for n, about in header.items() if n != "__metadata__"}
        end = 0
        for name, about in sorted(_entries(header), key=lambda entry: entry[1]["data_offsets"]):
            first, last = about["data_offsets"]
            elements = _elements(shapes[name])
            if first != end or last - first != elements * _WIDTHS[about["dtype"]]:
                raise ValueError(f"the byte range of {name} does not hold its shape {shapes[name]}")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"its header claims {8 + length + end:,} bytes of {size:,}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return shapes


def _entries(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, about) for name, about in header.items() if name != "__metadata__"]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for width in shape:
        if not isinstance(width, int) or width < 0:
            raise ValueError(f"a shape holds {width!r}")
        count *= width
    return count


def check_base(about: Mapping[str, Any], shape: ModelShape, folder: Path) -> None:
    """Raises ValueError when a base has another shape than the adapter's; by its config, before weights are read."""
    trained = ModelShape(**about["base"]["shape"])
    if trained != shape:
        raise ValueError(
            f"{folder} was trained on {about['base']['source']} ({trained.layers} layers of width {trained.hidden}, "
            f"{trained.parameters:,} parameters); this base has {shape.layers} of {shape.hidden}, "
            f"{shape.parameters:,}: load it on the base it was trained on"
        )


def load(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> nn.Module:
    """The base with the saved adapter on it, in eval mode. Raises ValueError, before memory is taken, for a file that
    does not hold what the description and the base ask for, and for another base's adapter."""
    found = fingerprint(model)
    if found != about["base"]["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on {about['base']['source']} with the weights {about['base']['fingerprint']}; "
            f"this base has {found}: load it on the base it was trained on"
        )
    if about["method"] in IN_PEFT_FORMAT:
        return (_load_lora if about["method"] == "lora" else _load_meft)(model, folder).eval()
    options = parse_options(about["method"], about["options"])
    header = read_header(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None
    if header is None:
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}: copy the whole folder")
    claimed = sum(find_method(about["method"]).count(options, models.shape_of(model)).values())
    # AdapterH's formula counts a gated FFN's three sites; others have two.
    if claimed > 2 * sum(_elements(shape) for shape in header.values()):
        raise ValueError(f"{folder}: its options claim {claimed:,} parameters, {WEIGHTS} does not hold them")
    attached = find_method(about["method"]).attach(model, options, 0)
    own = _own(attached)
    expected = {name: tuple(p.shape) for name, p in own.items()}
    _check_names(folder / WEIGHTS, header, expected)
    tensors = read_safetensors(folder / WEIGHTS)
    check_tensors(folder / WEIGHTS, tensors, expected)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    attached.model.eval()
    return attached.model


def _check_names(path: Path, header: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    check_tensors(path, {name: torch.empty(shape, device="meta") for name, shape in header.items()}, expected)


_LORA_READ = ("r", "lora_alpha", "target_modules", "fan_in_fan_out", "bias", "lora_dropout", "task_type")
_LORA_MEANS_NOTHING = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_type",
    "peft_version",
    "auto_mapping",
)


def _load_meft(model: nn.Module, folder: Path) -> nn.Module:
    """peft's own way: the method's configuration checks the folder's header and the base before rows are made."""
    from peft import PeftModel

    from meft_bench.integrations import peft_method

    adapted = PeftModel.from_pretrained(cast(Any, model), folder)
    if not all(isinstance(config, peft_method.MeftConfig) for config in adapted.peft_config.values()):
        raise ValueError(f"{folder / PEFT_CONFIG} is not a MEFT adapter's")
    return adapted


def _load_lora(model: nn.Module, folder: Path) -> nn.Module:
    """peft's own adapter format, with the plain settings train writes; anything beyond them is refused."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: copy the whole folder")
    fields = read_json(folder / PEFT_CONFIG)
    plain = LoraConfig().to_dict()
    for name, value in fields.items():
        if name not in (*_LORA_READ, *_LORA_MEANS_NOTHING) and value and value != plain.get(name):
            raise ValueError(f"{folder / PEFT_CONFIG} sets {name}={value!r}, which is not read here: load it with peft")
    header = read_header(folder / PEFT_WEIGHTS)
    ranks = {shape[0] for name, shape in header.items() if "lora_A" in name and shape}
    if ranks != {fields.get("r")}:
        raise ValueError(f"{folder}: r={fields.get('r')!r}, but {PEFT_WEIGHTS} holds the ranks {sorted(ranks)}")
    try:
        config = LoraConfig(**{name: fields[name] for name in _LORA_READ if name in fields})
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG} does not fit this base: {error}") from None
    wanted = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    _check_names(folder / PEFT_WEIGHTS, header, {name: tuple(p.shape) for name, p in wanted.items()})
    set_peft_model_state_dict(adapted, read_safetensors(folder / PEFT_WEIGHTS))
    return adapted
