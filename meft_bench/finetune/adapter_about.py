"""What an adapter folder says of itself, read as data only and without torch.

An adapter may come from a stranger: links, foreign files, files too large and descriptions that are none are refused
here, in one line; adapters.py looks at the weights.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.finetune.workplace import PARTIAL, RUN, TRAINING
from meft_bench.inputs import named_model
from meft_bench.meft.files import JSON_BYTES, read_json
from meft_bench.named import EMBEDDED, NAMED
from meft_bench.reading import regular_size
from meft_bench.text import first_line, printable
from meft_bench.train.contract import describe
from meft_bench.train.methods import ModelShape

FORMAT = 1
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers writes a tokenizer's further templates, each under its name."""
ABOUT, WEIGHTS = "adapter.json", "adapter.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = (".safetensors", ".json", ".md", ".jinja", ".txt")
LARGEST_TEMPLATE = 2**20
_LARGEST_TOKENIZER = 128 * 2**20
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that an adapter belongs to."""

    source: str
    """A folder, a hub id or "embedded"."""
    revision: str | None
    shape: dict[str, int]
    fingerprint: str
    """See fingerprint()."""
    local: bool = False
    """source is a folder, though it may read like a hub id where it is not at hand."""


def read_about(folder: Path) -> dict[str, Any]:
    """adapter.json of a folder whose files are only what may be read. Raises ValueError or FileNotFoundError."""
    check_folder(folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"no {ABOUT} in {printable(folder)}: give the folder that meft-bench train wrote")
    about = read_json(folder / ABOUT, what="adapter description")
    try:
        if "config" in about and "method" not in about:
            raise ValueError("MeftModel.save of an earlier version wrote it: read it with meft_bench.meft.model.load")
        if about["format"] != FORMAT or isinstance(about["format"], bool):
            raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
        for name, kind in _KINDS.items():
            if not isinstance(about[name], kind):
                raise TypeError(f"{name} is {type(about[name]).__name__}, not {kind.__name__}")
        _check_base_entry(Base(**about["base"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{printable(folder / ABOUT)} is not an adapter description: {first_line(error)}") from None
    _check_training(folder / TRAINING)
    return about


def check_rows(about: Mapping[str, Any], rows: str) -> None:
    """Raises ValueError for a form of the rows in which only MEFT's, in host memory, can be held."""
    if rows == "fp32":
        return
    method = describe(about["method"])
    if method.place != "host" or method.saved != "peft":
        raise ValueError(f"--rows {rows} is for MEFT's rows in host memory; this is {method.name}: leave it out")
    if not method.on_host(about["options"]):
        raise ValueError(f"--rows {rows} is for rows in host memory; this adapter has placement=device: leave it out")


def _check_training(path: Path) -> None:
    """Raises ValueError for a training.json whose account of the rows, which decides how prompts are put, is none."""
    data = read_json(path).get("data") if path.is_file() else None
    if not isinstance(data, dict | None):
        raise ValueError(f"{printable(path)}: data is {type(data).__name__}, and must be an object")
    if not isinstance(delimiter := (data or {}).get("delimiter", ""), str):
        raise ValueError(f"{printable(path)}: delimiter is {type(delimiter).__name__}, and must be text")


_KINDS = {"method": str, "options": dict, "base": dict, "shapes": dict}


def _check_base_entry(base: Base) -> None:
    """Raises TypeError or ValueError for an entry of another kind, which would be an error further on."""
    ModelShape(**base.shape)
    for name, size in base.shape.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 62:
            raise ValueError(f"{name} of the base must be a whole number above 0")
    for name in ("source", "fingerprint", "revision"):
        text = getattr(base, name)
        if not (isinstance(text, str) and len(text) <= 4096) and not (text is None and name == "revision"):
            raise ValueError(f"{name} of the base must be a text")
    if not base.source or not isinstance(base.local, bool):
        raise ValueError("source of the base must be a text that is not empty, and local true or false")


def check_folder(folder: Path) -> None:
    """Raises ValueError for a link, a pipe, a device, a file that is neither safetensors nor text, or one too large,
    and for a folder other than that of further chat templates; FileNotFoundError for no folder."""
    begun = folder if folder.is_dir() else folder.absolute().with_name(f"{folder.absolute().name}{PARTIAL}")
    if (begun / RUN).is_file() and not (folder / ABOUT).exists():
        raise FileNotFoundError(
            f"{printable(begun)} is an unfinished run: give its meft-bench train command again, with --resume"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {printable(folder)}: give the folder that meft-bench train wrote")
    for file in sorted([*folder.iterdir(), *(folder / MORE_TEMPLATES).glob("*")]):
        if file.name.startswith("."):
            continue  # what git and the hub's client keep; never opened here
        if file.is_symlink():
            raise ValueError(
                f"{printable(file)} is a link: an adapter folder must hold the files themselves; copy them"
            )
        if file == folder / MORE_TEMPLATES and file.is_dir():
            continue  # its files are looked at themselves
        if file.is_dir() or file.suffix not in ((".jinja",) if file.parent != folder else _READ):
            raise ValueError(
                f"{printable(file)} does not belong in an adapter folder: only safetensors and JSON are read"
            )
        regular_size(file, _most(file), "adapter file")


def _most(file: Path) -> int:
    if file.name.startswith(("tokenizer", "vocab", "merges", "added_tokens", "model.safetensors.index")):
        return _LARGEST_TOKENIZER
    if file.suffix == ".safetensors":
        return 1 << 62
    return LARGEST_TEMPLATE if file.suffix == ".jinja" else JSON_BYTES


def find_base(about: Mapping[str, Any], model: str | None) -> tuple[str | Path, str | None]:
    """Where the adapter's base is, and its revision; model is what the user names instead. Raises ValueError for one
    that is not here, before a network is asked for what was a folder."""
    base = Base(**about["base"])
    if model is not None:
        return named_model(model), None
    here = os.path.isdir(base.source)
    hub_or_embedded = base.source in (EMBEDDED, *NAMED) or _HUB_ID.fullmatch(base.source)
    if not here and (base.local or not hub_or_embedded):
        raise ValueError(
            f"the adapter's base {printable(base.source)} is not here: name it with --model FOLDER_OR_HUB_ID"
        )
    return named_model(base.source), base.revision
