"""Saved adapters: written whole, read as data only.

A folder holds the adapter's weights (safetensors), adapter.json {format, method, options, base, shapes} and, written by
train.py, training.json and README.md. MEFT, LoRA and SHiRA are in peft's format, so that PeftModel.from_pretrained
reads the folder too; full fine-tuning is a model folder of transformers. An adapter may come from a stranger: links,
foreign files, broken headers and claimed sizes that the file does not hold are refused before memory is taken, and
nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from meft_bench.finetune import adapter_about
from meft_bench.finetune.adapter_about import (
    ABOUT,
    CHAT_TEMPLATE,
    FORMAT,
    LARGEST_TEMPLATE,
    MORE_TEMPLATES,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    WEIGHTS,
    Base,
)
from meft_bench.host_memory import available_bytes
from meft_bench.meft.files import (
    TensorInfo,
    check_finite,
    check_floats,
    check_tensors,
    read_header,
    read_json,
    read_safetensors,
)
from meft_bench.reading import read_text
from meft_bench.text import first_line, printable
from meft_bench.train import models
from meft_bench.train.contract import describe
from meft_bench.train.methods import Attached, ModelShape, find_method, parse_options
from meft_bench.train.model_files import quiet

_RETRAIN = "the training diverged or the file is damaged; take another adapter"
_SAMPLE = 64


def base_of(model: nn.Module, source: str, revision: str | None) -> Base:
    """Identity of a base before anything is attached to it."""
    shape, local = asdict(models.shape_of(model)), os.path.isdir(source)
    return Base(source=source, revision=revision, shape=shape, fingerprint=fingerprint(model), local=local)


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


def check_attaches(method: str, model: nn.Module) -> None:
    """Raises ValueError for a base that the method cannot be attached to as it will be saved; model may be without
    weights. What other methods need shows where their parameters are counted."""
    if method == "meft":
        from meft_bench.integrations.peft_method import wrapped_ffn_names

        wrapped_ffn_names(model)


def attach(model: nn.Module, method: str, options: dict[str, Any], seed: int) -> Attached:
    """The method on the base, as it will be saved: MEFT inside a PeftModel, the others as the harness attaches them."""
    parsed = parse_options(method, options)
    with quiet():
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
    saved = describe(method).saved
    if saved == "model":
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif saved == "peft":
        # "auto" would ask the hub whether the vocabulary was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        tensors = {name: p.detach().cpu().contiguous() for name, p in _own(attached).items()}
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        save_file(tensors, folder / WEIGHTS)
    about = {"format": FORMAT, "method": method, "options": options, "base": asdict(base), "shapes": shapes}
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _own(attached: Attached) -> dict[str, nn.Parameter]:
    """The method's tensors by their names in the model."""
    trained = {id(p) for p in attached.parameters()}
    return {name: p for name, p in attached.model.named_parameters() if id(p) in trained}


# ---- reading ----


def read_about(folder: Path) -> dict[str, Any]:
    """adapter_about.read_about, and a look at the chat templates if there are any. Raises the same."""
    about = adapter_about.read_about(folder)
    for template in [*folder.glob(CHAT_TEMPLATE), *(folder / MORE_TEMPLATES).glob("*.jinja")]:
        _check_template(template)
    return about


def _check_template(path: Path) -> None:
    """Raises ValueError for a chat template that is no Jinja: compiled as transformers does, and not rendered."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    text = read_text(path, LARGEST_TEMPLATE, "chat template")
    try:
        _compile_jinja_template(text)
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f"{printable(path)}, line {line}," if line else printable(path)
        raise ValueError(f"{where} is no chat template in Jinja: {first_line(error)}") from None


def check_base(about: Mapping[str, Any], shape: ModelShape, folder: Path) -> None:
    """Raises ValueError when a base has another shape than the adapter's; by its config, before weights are read."""
    trained = ModelShape(**about["base"]["shape"])
    if trained != shape:
        raise ValueError(
            f"{printable(folder)} was trained on {printable(about['base']['source'])} ({trained.layers} layers of "
            f"width {trained.hidden}, {trained.parameters:,} parameters); this base has {shape.layers} of "
            f"{shape.hidden}, {shape.parameters:,}: load it on the base it was trained on"
        )


def load(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> nn.Module:
    """The base with the saved adapter on it, in eval mode. Raises ValueError, before memory is taken, for a file that
    does not hold what the description and the base ask for, and for another base's adapter."""
    found = fingerprint(model)
    if found != about["base"]["fingerprint"]:
        raise ValueError(
            f"{printable(folder)} was trained on {printable(about['base']['source'])} with the weights "
            f"{printable(about['base']['fingerprint'])}; "
            f"this base has {found}: load it on the base it was trained on"
        )
    saved = describe(about["method"]).saved
    if saved == "model":
        raise ValueError(f"{printable(folder)} holds a whole model, not an adapter: load it as the base")
    if saved == "peft":
        if about["method"] == "shira":
            return _load_shira(model, folder, about["options"]).eval()
        return (_load_lora if about["method"] == "lora" else _load_meft)(model, folder).eval()
    return _load_own(model, folder, about["method"], about["options"]).eval()


def _load_own(model: nn.Module, folder: Path, method: str, given: dict[str, Any]) -> nn.Module:
    """A method without a format of its own: its tensors by their names in the model."""
    try:
        options = parse_options(method, given)
        claimed = sum(find_method(method).count(options, models.shape_of(model)).values())
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"the options in {printable(folder / ABOUT)} are none of {method}: {first_line(error)}"
        ) from None
    header = _checked_header(folder / WEIGHTS)
    # AdapterH's formula counts a gated FFN's three sites; others have two.
    if claimed > 2 * sum(tensor.elements for tensor in header.values()):
        raise ValueError(f"{printable(folder)}: its options claim {claimed:,} parameters, {WEIGHTS} does not hold them")
    attached = find_method(method).attach(model, options, 0)
    own = _own(attached)
    expected = {name: tuple(p.shape) for name, p in own.items()}
    check_tensors(folder / WEIGHTS, header, expected)
    tensors = read_safetensors(folder / WEIGHTS)
    check_finite(printable(folder / WEIGHTS), tensors.items(), _RETRAIN)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return attached.model


def _checked_header(path: Path, whole: Collection[str] = ()) -> dict[str, TensorInfo]:
    """The header of an adapter's weights that memory is there for; the tensors named in whole hold no floats. Raises
    ValueError, FileNotFoundError for no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {printable(path.parent)}: copy the whole folder")
    header = read_header(path)
    check_floats(path, {name: tensor for name, tensor in header.items() if name not in whole})
    needed, free = 2 * path.stat().st_size, available_bytes()
    if needed > free:
        raise ValueError(
            f"{printable(path)} takes {needed / 2**30:,.1f} GiB of memory to load, {free / 2**30:,.1f} GiB are free"
        )
    return header


def _load_shira(model: nn.Module, folder: Path, given: dict[str, Any]) -> nn.Module:
    """peft's own format: the entries of every adapted matrix, and their places, which no seed gives again."""
    adapted = find_method("shira").attach(model, parse_options("shira", given), 0).model
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "shira_indices")}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        shapes[f"{name}.shira_weight"] = tuple(layer.shira_weight["default"].shape)
        shapes[f"{name}.shira_indices"] = tuple(layer.shira_indices["default"].shape)
    path, places = folder / PEFT_WEIGHTS, [name for name in shapes if name.endswith("shira_indices")]
    header = _checked_header(path, places)
    check_tensors(path, header, shapes)
    if wrong := [name for name in places if header[name].dtype != "I32"]:
        raise ValueError(f"{printable(path)}: {wrong[0]} is {header[wrong[0]].dtype}, places are I32")
    tensors = read_safetensors(path)
    check_finite(printable(path), ((n, t) for n, t in tensors.items() if n not in places), _RETRAIN)
    with torch.no_grad():
        for name, layer in layers.items():
            found, size = tensors[f"{name}.shira_indices"], torch.tensor(layer.get_base_layer().weight.shape)
            # torch reads and writes outside of the matrix where a place is.
            if bool((found < 0).any()) or bool((found.amax(1) >= size).any()):
                raise ValueError(f"{printable(path)}: {name}.shira_indices names places outside of its matrix")
            layer.shira_weight["default"].copy_(tensors[f"{name}.shira_weight"])
            layer.shira_indices["default"] = found.to(layer.shira_weight["default"].device)
    return adapted


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
    from meft_bench.meft import adapter_folder

    adapter_folder.check_folder(folder)  # before peft, which opens the description without a limit
    with quiet():
        # Where there is a GPU, peft would read all rows into its memory on their way to the host's.
        adapted = PeftModel.from_pretrained(cast(Any, model), folder, torch_device="cpu")
    if not all(isinstance(config, peft_method.MeftConfig) for config in adapted.peft_config.values()):
        raise ValueError(f"{folder / PEFT_CONFIG} is not a MEFT adapter's")
    return adapted


def _load_lora(model: nn.Module, folder: Path) -> nn.Module:
    """peft's own adapter format, with the plain settings train writes; anything beyond them is refused."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if not (folder / PEFT_CONFIG).is_file():
        raise FileNotFoundError(f"no {PEFT_CONFIG} in {printable(folder)}: copy the whole folder")
    fields = read_json(folder / PEFT_CONFIG)
    _check_lora_fields(folder / PEFT_CONFIG, fields, LoraConfig().to_dict())
    path = folder / PEFT_WEIGHTS
    header = _checked_header(path)
    ranks = {tensor.shape[0] for name, tensor in header.items() if "lora_A" in name and tensor.shape}
    if ranks != {fields.get("r")}:
        held = ", ".join(map(str, sorted(ranks)[:4])) or "none"
        raise ValueError(
            f"{printable(folder)}: r={printable(fields.get('r'))}, but {PEFT_WEIGHTS} holds the ranks {held}"
        )
    try:
        config = LoraConfig(**{name: fields[name] for name in _LORA_READ if name in fields})
        with quiet():
            adapted = get_peft_model(cast(Any, model), config, low_cpu_mem_usage=True)  # on the meta device
    except Exception as error:  # peft raises many kinds; the user needs one line
        raise ValueError(f"{printable(folder / PEFT_CONFIG)} does not fit this base: {first_line(error)}") from None
    wanted = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    check_tensors(path, header, {name: tuple(p.shape) for name, p in wanted.items()})
    tensors = read_safetensors(path)
    check_finite(printable(path), tensors.items(), _RETRAIN)
    device = next(p.device for p in adapted.parameters() if not p.is_meta)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    return adapted


def _check_lora_fields(path: Path, fields: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting beyond the plain ones, and for a plain one of another kind."""
    for name, value in fields.items():
        if name not in (*_LORA_READ, *_LORA_MEANS_NOTHING) and value and value != plain.get(name):
            raise ValueError(
                f"{printable(path)} sets {printable(name)}={printable(repr(value))[:200]}, which is not read here: "
                "load it with peft"
            )
    targets, dropout = fields.get("target_modules"), fields.get("lora_dropout")
    right = {
        "r": _is_number(fields.get("r")) and isinstance(fields["r"], int) and fields["r"] > 0,
        "lora_alpha": _is_number(fields.get("lora_alpha", 1)) and abs(fields.get("lora_alpha", 1)) < 1 << 24,
        "target_modules": isinstance(targets, list) and all(isinstance(target, str) for target in targets),
        "lora_dropout": dropout is None or (_is_number(dropout) and 0 <= dropout < 1),
        "fan_in_fan_out": isinstance(fields.get("fan_in_fan_out", False), bool),
        "bias": str(fields.get("bias", "none")) in ("none", "all", "lora_only"),
        "task_type": fields.get("task_type") is None or isinstance(fields["task_type"], str),
        "peft_type": fields.get("peft_type", "LORA") == "LORA",
    }
    if wrong := [name for name, fits in right.items() if not fits]:
        value = printable(repr(fields.get(wrong[0])))[:80]
        raise ValueError(f"{printable(path)}: {wrong[0]}={value} is none that a LoRA adapter has")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
