"""An adapter folder from a stranger: one line that says what is wrong, without memory, and never a wrong answer."""

import html
import json
import os
import shutil

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from meft_bench import cli
from meft_bench.finetune.generate import load_adapted
from meft_bench.text import printable
from meft_bench.train import models
from tests.limits import within

from .conftest import job, write_lines

METHODS = ("meft", "lora", "parallel_adapter", "adapter_h", "full")


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved adapter to be broken."""

    def make(method: str):
        return shutil.copytree(saved(method), tmp_path / method)

    return make


def weights(folder):
    return next(folder.glob("*.safetensors"))


def edit_tensors(folder, change) -> None:
    tensors = load_file(weights(folder))
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights(folder), metadata={"format": "pt"})


def edit(folder, name: str, *path, value) -> None:
    """Set one entry of a JSON file."""
    about = json.loads((folder / name).read_text())
    inner = about
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / name).write_text(json.dumps(about))


def refused(folder, capsys, *more: str) -> str:
    """The one line that generate answers with, in little time and memory."""
    capsys.readouterr()
    with within():
        code = cli.main(["generate", "--adapter", str(folder), "--prompt", "who ?", "--device", "cpu", *more])
    printed = capsys.readouterr()
    assert code == 2 and not printed.out, printed.out
    assert printed.err.startswith("meft-bench: ") and printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err.rstrip("\n").removeprefix("meft-bench: ")


# ---- weights that are not there ----


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_missing_is_named(copied, capsys, method):
    folder, gone = copied(method), []
    edit_tensors(folder, lambda t: gone.extend((n, t.pop(n))[0] for n in sorted(t) if "layers.2." in n))
    said = refused(folder, capsys)
    assert "lack" in said and f"{len(gone)} tensors" in said and "layers.2." in said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_named(copied, capsys, method, value):
    folder = copied(method)
    name = sorted(load_file(weights(folder)))[-1]

    def break_one(tensors) -> None:
        tensors[name].view(-1)[-1] = value

    edit_tensors(folder, break_one)
    said = refused(folder, capsys)
    assert "holds NaN or infinity in the tensor" in said and name.removeprefix("base_model.model.") in said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused(copied, capsys, method, dtype):
    folder = copied(method)
    edit_tensors(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    assert {torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}[dtype] in refused(folder, capsys)


def test_half_precision_is_read_as_before(copied):
    folder = copied("lora")
    edit_tensors(folder, lambda t: t.update({n: v.half() for n, v in t.items()}))
    model = load_adapted(folder, device="cpu").model
    held = load_file(weights(folder))
    parameters = dict(model.named_parameters())
    for name, tensor in held.items():
        found = parameters[name.replace(".weight", ".default.weight")]
        assert found.dtype == torch.float32 and torch.equal(found, tensor.float())


def test_a_shape_of_the_full_model_that_differs_is_named(copied, capsys):
    folder = copied("full")
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(64)}))
    said = refused(folder, capsys)
    assert "model.norm.weight has shape (64,) in its files, and its config asks for (128,)" in said


# ---- sizes that are claimed ----


def test_a_vocabulary_of_six_millions_takes_no_memory(copied, capsys):
    folder = copied("full")
    edit(folder, "config.json", "vocab_size", value=6_000_000)
    assert "far more than its weight files hold" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000, and its weight files hold 39 tensors"),
        ("num_hidden_layers", 6, "the weight files of the model full lack 18 tensors (model.layers.4."),
        ("intermediate_size", 10**9, "far more than its weight files hold"),
        ("num_labels", 10**9, "that is no model's"),
        ("num_hidden_layers", 0, "must have at least 1"),
        ("num_hidden_layers", 2, "that its config has no place for"),
        ("hidden_act", "swoosh", "it names 'swoosh', which transformers does not know"),
        ("rms_norm_eps", float("nan"), "that is no model's"),
        ("transformers_weights", "../other.safetensors", "must name a file of its own folder"),
    ],
)
def test_a_config_that_its_weights_do_not_hold_is_refused(copied, capsys, name, value, message):
    folder = copied("full")
    edit(folder, "config.json", name, value=value)
    assert message in refused(folder, capsys)


def test_a_rank_that_the_bases_matrices_do_not_have_takes_no_memory(copied, capsys):
    """A small file may hold r = 300,000 rows of width 1; every other matrix of that rank would take gigabytes."""
    folder = copied("lora")
    edit(folder, "adapter_config.json", "r", value=300_000)
    edit_tensors(folder, lambda t: t.update({n: torch.zeros(300_000, 1) for n in list(t)[:1] if "lora_A" in n}))
    edit_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "lora_A" in n and len(t[n]) < 300_000])
    said = refused(folder, capsys)
    assert "lacks 7 tensors" in said and "lora_A" in said


@pytest.mark.parametrize(
    ("method", "file", "path"),
    [("parallel_adapter", "adapter.json", ("options", "neurons")), ("adapter_h", "adapter.json", ("options", "size"))],
)
def test_options_of_a_thousand_millions_take_no_memory(copied, capsys, method, file, path):
    folder = copied(method)
    edit(folder, file, *path, value=10**9)
    assert "its options claim" in refused(folder, capsys)


def test_more_than_the_memory_that_is_free_is_refused(copied, capsys):
    """A file with holes agrees with its own header and costs nothing to make."""
    folder = copied("parallel_adapter")
    shapes = {name: list(t.shape) for name, t in load_file(weights(folder)).items()}
    header, end = {}, 0
    for name in shapes:
        header[name] = {"dtype": "F32", "shape": [2**30, 128], "data_offsets": [end, end + 2**39]}
        end += 2**39
    text = json.dumps(header).encode()
    with open(weights(folder), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    edit(folder, "adapter.json", "options", "neurons", value=2**30)
    assert "GiB of memory to load" in refused(folder, capsys)


# ---- files of another kind ----


JSONS = {"meft": ("adapter.json", "adapter_config.json", "training.json"), "lora": ("adapter_config.json",),
         "full": ("config.json", "tokenizer.json", "tokenizer_config.json")}  # fmt: skip
CONTENTS = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "bytes": b"\x80\x00\xff",
    "half": b'{"format": 1, "method": "me',
}


@pytest.mark.parametrize(("method", "file"), [(m, f) for m, files in JSONS.items() for f in files])
def test_a_description_that_is_none_is_named(copied, capsys, method, file):
    folder = copied(method)
    for content in CONTENTS.values():
        (folder / file).write_bytes(content)
        said = refused(folder, capsys)
        assert str(folder) in said or folder.name in said
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert "is a pipe: " in refused(folder, capsys)
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    assert "is a link" in refused(folder, capsys)
    (folder / file).unlink()
    with open(folder / file, "wb") as sparse:
        sparse.truncate(300 << 20)
    assert "has 314,572,800 bytes" in refused(folder, capsys)


@pytest.mark.parametrize("method", ["meft", "lora", "parallel_adapter", "full"])
def test_weights_that_are_no_file_are_refused(copied, capsys, method):
    folder = copied(method)
    file = weights(folder)
    with open(file, "ab") as grown:
        grown.truncate(40 << 30)
    assert "is not a whole safetensors file" in refused(folder, capsys)
    with open(file, "wb") as holes:
        holes.truncate(40 << 30)
    assert "is not a whole safetensors file" in refused(folder, capsys)
    file.unlink()
    os.mkfifo(file)
    assert "is a pipe: " in refused(folder, capsys)


WRONG = [None, True, -1, 1.5, "x", [1], 10**30, float("nan")]


@pytest.mark.parametrize(
    ("method", "file", "path", "right"),
    [
        ("meft", "adapter.json", ("format",), ()),
        ("meft", "adapter.json", ("method",), ()),
        ("meft", "adapter.json", ("base",), ()),
        ("meft", "adapter.json", ("base", "source"), ()),
        ("meft", "adapter.json", ("base", "fingerprint"), ()),
        ("meft", "adapter.json", ("base", "local"), (True,)),
        ("meft", "adapter.json", ("base", "shape"), ()),
        ("meft", "adapter.json", ("base", "shape", "layers"), ()),
        ("parallel_adapter", "adapter.json", ("options", "neurons"), ()),
        ("lora", "adapter_config.json", ("r",), ()),
        ("lora", "adapter_config.json", ("lora_alpha",), (-1, 1.5)),
        ("lora", "adapter_config.json", ("target_modules",), ()),
        ("lora", "adapter_config.json", ("bias",), ()),
        ("meft", "adapter_config.json", ("r",), ()),
        ("meft", "adapter_config.json", ("k",), (1.5,)),
        ("meft", "adapter_config.json", ("peft_type",), ()),
        ("meft", "adapter_config.json", ("seed",), (-1,)),
        ("meft", "adapter_config.json", ("target_modules",), (None,)),
        ("meft", "training.json", ("data",), (None,)),
    ],
)
def test_values_of_another_kind_are_named(copied, capsys, method, file, path, right):
    folder = copied(method)
    kept = (folder / file).read_bytes()
    for value in WRONG:
        if any(value is r or (type(value) is type(r) and value == r) for r in right):
            continue
        edit(folder, file, *path, value=value)
        refused(folder, capsys)
        (folder / file).write_bytes(kept)


@pytest.mark.parametrize("method", ["lora", "meft"])
def test_a_pattern_that_never_ends_is_not_tried(copied, capsys, method):
    folder = copied(method)
    edit(folder, "adapter_config.json", "target_modules", value="(\\w+)+$")
    assert "target_modules" in refused(folder, capsys)
    if method == "meft":
        edit(folder, "adapter_config.json", "target_modules", value=None)
        edit(folder, "adapter_config.json", "exclude_modules", value="((model|layers|[.]|\\d)+)+x")
        assert "may never end" in refused(folder, capsys)


def test_a_template_that_is_no_template_is_named(copied, capsys):
    folder = copied("meft")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{% if %}")
    assert "chat_template.jinja, line 2, is no chat template in Jinja" in refused(folder, capsys)
    (folder / "chat_template.jinja").write_text("x" * (2 << 20))
    assert "has 2,097,152 bytes" in refused(folder, capsys)


# ---- the base ----


def test_an_adapter_that_is_a_base_and_a_base_that_is_an_adapter(copied, capsys, saved):
    assert "is an adapter and no base model" in refused(copied("meft"), capsys, "--model", str(saved("meft")))


def test_a_relative_base_is_a_folder_wherever_the_adapter_is_used(tmp_path, monkeypatch, capsys):
    from meft_bench.finetune.train import train

    shutil.copytree(models.embedded_dir(), tmp_path / "models" / "control")
    monkeypatch.chdir(tmp_path)
    train(job(tmp_path / "out", model="models/control", steps=1), say=lambda line: None)
    assert load_adapted(tmp_path / "out", device="cpu").chat is False
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = refused(tmp_path / "out", capsys)
    assert said == "the adapter's base models/control is not here: name it with --model FOLDER_OR_HUB_ID"
    load_adapted(tmp_path / "out", str(tmp_path / "models" / "control"), device="cpu")


# ---- names ----


def test_names_that_forge_lines_stay_one_line(copied, capsys, tmp_path):
    folder = copied("meft").rename(tmp_path / "a\nmeft-bench: fine\x1b[2J")
    edit(folder, "adapter.json", "base", "source", value="x\nmeft-bench: all is well\x1b[2J")
    said = refused(folder, capsys)
    assert "x\\nmeft-bench: all is well\\x1b[2J is not here" in said
    (folder / "adapter.json").unlink()
    assert "a\\nmeft-bench: fine\\x1b[2J" in refused(folder, capsys)


def test_names_in_a_model_card_are_shown_as_themselves(tmp_path):
    from meft_bench.finetune.train import train

    name = "r\n| x | <img src=x onerror=a> [l](javascript:a) `c`.jsonl"
    rows = write_lines(tmp_path / name, [{"prompt": "who ?", "completion": "nobody"}] * 4)
    lines: list[str] = []
    settings = job(tmp_path / "out", data=str(rows), eval_share=0, steps=1, batch_size=2, eval_rows=2)
    card = (train(settings, say=lines.append) / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| data |"))
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render("| | |\n|---|---|\n" + row)
    cell = page.split("<td>")[2].split("</td>")[0]
    assert "<" not in cell and html.unescape(cell).startswith(f"{printable(name)}, digest ")
    assert lines[0].startswith("rows r\\n| x |")


def test_other_libraries_say_nothing(saved, capfd):
    adapters = [str(saved(method)) for method in ("meft", "lora", "full")]
    capfd.readouterr()  # of training them
    for adapter in adapters:
        assert cli.main(["generate", "--adapter", adapter, "--prompt", "who ?", "--device", "cpu"]) == 0
    assert capfd.readouterr().err == ""
