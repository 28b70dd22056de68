"""The commands as processes of their own: refused within 500 MB of address space, quickly, with nothing left."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from meft_bench import cli
from meft_bench.harness import cli as harness_cli
from meft_bench.harness import room
from meft_bench.train.contract import describe, method_names
from meft_bench.train.methods import parse_options
from meft_bench.train.options import check_options

_MEMORY = 500 * 10**6
TRAIN = ["train", "--data", "example", "--output", "a/b/out"]
RUN = ["run", "--task", "facts", "--method"]
CASES = {
    "neurons of meft": ([*RUN, "meft", "--option", "neurons=1000000000"], "neurons=1,000,000,000 needs at least"),
    "rank of lora": ([*RUN, "lora", "--option", "rank=2147483647"], "lora with rank=2,147,483,647 needs at least"),
    "size of adapter_h": ([*RUN, "adapter_h", "--option", "size=100000000000"], "at most 2,147,483,647"),
    "neurons": ([*TRAIN, "--neurons", "1000000000"], "take a smaller neurons"),
    "batch": ([*TRAIN, "--batch-size", "1000000000"], "at most 1,048,576"),
    "batch at once": ([*RUN, "full", "--set", "batch_size=1048576"], "a smaller batch_size or a larger accumulation"),
    "epochs": ([*TRAIN, "--epochs", "1e300"], "--epochs 1e300 must be a number above 0 and at most 1e+06"),
    "endless epochs": ([*TRAIN, "--epochs", "inf"], "--epochs inf must be a number above 0 and at most 1e+06"),
    "rows": ([*RUN, "full", "--set", "train_rows=2000000000"], "at most 1,000,000"),
    "pipe": (["run", "pipe"], "pipe is a pipe: spec file must be a file"),
    "device": (["train", "/dev/zero"], "/dev/zero is a device: spec file must be a file"),
    "sparse": (["run", "sparse.yaml"], "sparse.yaml has 1,000,000,000,000 bytes"),
    "bomb": (["run", "bomb.yaml"], "bomb.yaml holds more than 20,000 values"),
    "deep": (["train", "deep.yaml"], "deep.yaml nests too deep"),
    "key": (["show", "/etc/passwd"], "key /etc/passwd is no run key|is no run key"),
    "profile": (["profile", "--seq", "1000000000"], "--seq 1000000000 must be a whole number of at least 2 and"),
    "no adapter": (["generate", "--adapter", "gone", "--prompt", "a"], "no adapter folder gone"),
    "no adapter to score": (["evaluate", "--adapter", "gone", "--tasks", "facts"], "no adapter folder gone"),
    "another folder": (["generate", "--adapter", "config", "--prompt", "a"], "no adapter.json in config: give the"),
    "another format": (["evaluate", "--adapter", "old", "--tasks", "facts"], "its format is 0, this version reads 1"),
    "a broken adapter": (["evaluate", "--adapter", "adapter", "--tasks", "facts"], "adapter.json is not JSON"),
    "no base": (["generate", "--adapter", "right", "--prompt", "a", "--model", "./gone"], "no model folder ./gone"),
    "its base is away": (["generate", "--adapter", "right", "--prompt", "a"], "the adapter's base ./away is not here"),
    "no prompts": (["generate", "--adapter", "right", "--file", "gone.txt"], "no file gone.txt"),
    "no rows of a task": (["evaluate", "--adapter", "right", "--tasks", "nq"], "nq needs rows: give --data FOLDER"),
    "no model": ([*TRAIN, "--model", "./gone"], "no model folder ./gone, and it is no hub id"),
    "a pickle": ([*TRAIN, "--model", "model"], "pytorch_model.bin is a pickle, which can run code"),
    "no data": (["train", "--data", "gone.jsonl", "--output", "a/b"], "no data file gone.jsonl"),
    "other columns": (["train", "--data", "rows.csv", "--output", "a/b"], "rows.csv, line 2 has the columns frage"),
    "no template": ([*TRAIN, "--chat-template", "gone.jinja"], "no chat template gone.jinja"),
    "taken output": (["train", "--data", "example", "--output", "model"], "model is not empty and no run of"),
    "no text": (["train", "--data", "b\udcff"], "is no text in the encoding"),
}  # fmt: skip


_SHAPE = {"hidden": 8, "layers": 1, "ffn": 8, "query": 8, "value": 8, "parameters": 99}
_BASE = {"source": "./away", "local": True, "revision": None, "shape": _SHAPE, "fingerprint": "a"}
FILES = {
    "rows.csv": "frage,antwort\na,b\n",
    "model/config.json": "{}",
    "model/pytorch_model.bin": "",
    "config/config.json": "{}",
    "adapter/adapter.json": "{",
    "old/adapter.json": '{"format": 0}',
    "right/adapter.json": json.dumps({"format": 1, "method": "lora", "options": {}, "shapes": {}, "base": _BASE}),
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A folder with files that are none."""
    folder = tmp_path_factory.mktemp("strange")
    os.mkfifo(folder / "pipe")
    with open(folder / "sparse.yaml", "wb") as file:
        file.truncate(10**12)
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(9)]
    (folder / "bomb.yaml").write_text("\n".join(lines), encoding="utf-8")
    (folder / "deep.yaml").write_text("data: " + "[" * 50_000, encoding="utf-8")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def started(arguments: list[str], folder, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meft_bench", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        preexec_fn=_limited,
        timeout=60,
    )


@pytest.mark.parametrize("name", CASES)
def test_refused_in_little_memory(strange, name):
    arguments, message = CASES[name]
    before = sorted(os.listdir(strange))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = started(arguments, strange)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("meft-bench: ") and any(m in done.stderr for m in message.split("|")), done.stderr
    assert spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime < 2
    assert sorted(os.listdir(strange)) == before


def test_no_method_s_table_differs_from_its_options():
    assert [name for name in method_names() if describe(name).untrained] == ["base"]
    for name in method_names():
        kinds = describe(name).kinds
        given = {"neurons": 64, "kept": 8} if name == "meft" else {}
        assert set(parse_options(name, given).__dataclass_fields__) == set(kinds)
        for option, kind in kinds.items():
            for value in (*getattr(kind, "allowed", ()), 1, 0, -1, "x", True, None, 1.5, 2**31):
                changed = {**given, option: value}
                assert _taken(check_options, name, changed) == _taken(parse_options, name, changed), changed


def _taken(check, *arguments) -> bool:
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


def test_room_is_counted_with_what_the_base_is(tmp_path, monkeypatch):
    monkeypatch.setattr(room.host_memory, "available_bytes", lambda: 10**9)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 1000, "n_layer": 10}}))

    def refused(options, method="meft", rows=1, device="cpu", model=tmp_path, limit=None):
        try:
            room.refuse_without_room(method, options, rows, device, model, limit)
        except ValueError as error:
            return str(error)
        return ""

    fits = 10**9 // (2 * 1000 * 10 * 12)
    assert not refused({"neurons": fits}) and "needs at least 1.0 GB" in refused({"neurons": fits + 1})
    assert refused({"neurons": fits + 1}).endswith(f"1.0 GB are free here: take a smaller neurons, {fits:,} at most")
    said = refused({"neurons": fits // 2 + 1}, limit=5 * 10**8)
    assert said.endswith(f"0.5 GB are given: take a smaller neurons, {fits // 2:,} at most")
    assert refused({"neurons": 9}, limit=10**5).endswith("take a smaller model")
    assert not refused({"neurons": fits // 2}, limit=5 * 10**8)
    assert refused({"neurons": fits + 1}, device="cuda") and not refused({"rank": fits + 1}, "lora", device="cuda")
    assert not refused({"neurons": fits + 1, "placement": "device"}, device="cuda")
    assert refused({"rank": fits + 1}, "lora") and refused(
        {"neurons": fits + 1}, "parallel_adapter_offload", device="cuda"
    )
    rows = 10**9 // (2 * 1000 * 10 * 34)
    assert not refused({}, "full", rows) and "a larger accumulation" in refused({}, "full", rows + 1)
    assert not refused({}, "full", rows + 1, device="cuda") and not refused({}, "base", rows + 1)
    assert not refused({"neurons": 10**7}, model="owner/name") and refused({"neurons": 10**8}, model="owner/name")
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"')
    assert not refused({"neurons": 10**7})


def test_columns_and_options_are_read_as_texts():
    from meft_bench.finetune.cli import train_settings

    def parsed(*arguments):
        return train_settings(cli._parser().parse_args(["train", "--data", "a", "--output", "b", *arguments]))

    assert parsed("--columns", "prompt=en,completion=no").columns == {"prompt": "en", "completion": "no"}
    assert parsed("--columns", "prompt=01,completion=1e3").columns == {"prompt": "01", "completion": "1e3"}
    assert parsed("--option", "wire=bf16", "--option", "key_std=1e-3").options == {"wire": "bf16", "key_std": 1e-3}
    assert parsed("--revision", "0123456").revision == "0123456"


def test_yaml_columns_named_no_and_01(tmp_path):
    from meft_bench.finetune.cli import train_settings

    text = "data: 2024\noutput: 01\ncolumns: {prompt: 01, completion: no}\nrevision: 1e10\noptions:\n"
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    made = train_settings(cli._parser().parse_args(["train", str(tmp_path / "job.yaml")]))
    assert made.columns == {"prompt": "01", "completion": "no"} and (made.data, made.output) == ("2024", "01")
    assert made.revision == "1e10" and made.options == {}


def test_paths_are_settings_too(tmp_path):
    from meft_bench.finetune.settings import TrainSettings

    made = TrainSettings(data=tmp_path / "a.jsonl", output=tmp_path / "b", model=tmp_path)
    assert made.data == str(tmp_path / "a.jsonl") and json.dumps(made.to_dict()) and made.destination == tmp_path / "b"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), "out of memory (the host's allocator): choose a smaller size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 4 bytes. Error code 12\nand more"), "out of memory (["),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has"), "out of memory (CUDA out of memory)"),
        (OSError(28, "No space left on device", "/a/b"), "No space left on device: b; check free space"),
        (FileNotFoundError(2, "No such file", "x"), "No such file"),
        (ValueError("one\ntwo"), "meft-bench: one two\n"),
    ],
)  # fmt: skip
def test_what_a_command_raises_is_one_line(monkeypatch, capsys, raised, said):
    def fail(args):
        raise raised

    monkeypatch.setattr(harness_cli, "_doctor", fail)
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(harness_cli, "_doctor", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND; see meft-bench --help"),
        (["fly"], "COMMAND invalid choice: 'fly'"),
        (["train", "--neuron"], "--neurons expected one argument; see meft-bench train --help"),
        (["list", "x"], "unrecognized arguments: x; see meft-bench --help"),
        (["generate", "--prompt", "a"], "arguments are required: --adapter; see meft-bench generate --help"),
        (["train", "--data", ""], "--data '' is empty"),
        (["bench", "--output", ""], "--output '' is empty"),
    ],
)  # fmt: skip
def test_arguments_that_are_none(capsys, arguments, said):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("meft-bench: ") and err.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} -m meft_bench list --suite full | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_terminal_that_cannot_show_it_is_no_error(tmp_path):
    done = started(["list", "ü"], tmp_path, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 2 and "set LC_ALL=C.UTF-8" in done.stderr and done.stderr.count("\n") == 1


def test_help_is_quick(tmp_path):
    began = time.process_time()
    done = started(["--help"], tmp_path)
    assert done.returncode == 0 and "COMMAND" in done.stdout and time.process_time() - began < 1


@pytest.mark.parametrize("settings", [{"lr": -1e-3}, {"lr": float("nan")}, {"lr": 1e39}, {"lr": 0, "weight_decay": -1}])
def test_no_optimizer_takes_a_rate_that_is_none(settings):
    import torch

    from meft_bench.train.methods import Attached

    parameter = torch.nn.Parameter(torch.zeros(2))
    attached = Attached(model=torch.nn.Module(), groups={"a": [parameter]})
    with pytest.raises(ValueError, match="must be a number of at least 0"):
        attached.make_optimizer(**settings)
    assert attached.make_optimizer(lr=0, weight_decay=0).param_groups[0]["lr"] == 0


def test_other_libraries_are_quiet(recwarn):
    import io
    import logging
    import warnings

    from lm_eval import evaluator
    from transformers.utils import logging as log

    from meft_bench import quiet

    with quiet.commands():
        for category in (FutureWarning, DeprecationWarning):
            warnings.warn("for programmers", category, stacklevel=1)
        assert not recwarn.list
        warnings.warn("for users", UserWarning, stacklevel=1)
    assert [str(w.message) for w in recwarn.list] == ["for users"]
    commit = evaluator.get_git_commit_hash
    try:
        quiet.loaded_libraries()
        assert log.tqdm([1], desc="Loading weights", file=io.StringIO()).disable
        assert not log.tqdm([1], desc="Fetching files", file=io.StringIO()).disable
        assert not logging.getLogger("lm_eval.evaluator").isEnabledFor(logging.WARNING)
        assert evaluator.get_git_commit_hash() is None
    finally:
        log.set_tqdm_hook(None)
        evaluator.get_git_commit_hash = commit
