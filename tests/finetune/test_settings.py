"""Settings come from YAML and the command line, and bad ones are named."""

import argparse
from dataclasses import fields

import pytest

from meft_bench import cli
from meft_bench.finetune.cli import train_settings
from meft_bench.finetune.settings import TrainSettings, memory_bytes


def parsed(*arguments: str) -> TrainSettings:
    args: argparse.Namespace = cli._parser().parse_args(["train", *arguments])
    return train_settings(args)


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "data: a.jsonl\noutput: out\nepochs: 2\nlearning_rate: 1e-3\nmethod: meft\noptions: {probed: 4, adam: lazy}\n"
    )
    settings = parsed(str(tmp_path / "job.yaml"), "--steps", "7", "--option", "probed=2", "--columns", "text=body")
    assert (settings.data, settings.steps, settings.epochs, settings.learning_rate) == ("a.jsonl", 7, None, 1e-3)
    assert settings.options == {"probed": 2, "adam": "lazy"} and settings.columns == {"text": "body"}


@pytest.mark.parametrize("name", ["neurons", "kept"])
def test_it_wins_in_whichever_form_a_size_is_given(tmp_path, name):
    by_flag, by_option = tmp_path / "flag.yaml", tmp_path / "option.yaml"
    by_flag.write_text(f"data: a.jsonl\noutput: out\n{name}: 96\n")
    by_option.write_text(f"data: a.jsonl\noutput: out\noptions: {{{name}: 96, probed: 4}}\n")
    for file in (by_flag, by_option):
        others = {} if file is by_flag else {"probed": 4}
        assert parsed(str(file)).method_options() == {name: 96, **others}
        for given in ([f"--{name}", "64"], ["--option", f"{name}=64"]):
            assert parsed(str(file), *given).method_options() == {name: 64, **others}
    with pytest.raises(ValueError, match=f"{name}=32 and the option {name}=64 differ"):
        parsed(str(by_flag), f"--{name}", "32", "--option", f"{name}=64").method_options()


def test_every_setting_has_a_flag():
    args = vars(cli._parser().parse_args(["train"]))
    assert {f.name for f in fields(TrainSettings)} <= set(args)
    assert all(args[f.name] is None for f in fields(TrainSettings)), "a default would win over the file"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "a"}, "no output given: name it with --output"),
        ({"data": "a", "output": "b", "colour": 1}, "unknown setting colour; known: accumulation"),
        ({"data": 3, "output": "b"}, "data=3 must be text"),
        ({"data": "a", "output": "b", "steps": 2, "epochs": 1}, "both say how long to train"),
        ({"data": "a", "output": "b", "batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"data": "a", "output": "b", "batch_size": 8, "accumulation": 3}, "accumulation=3 does not divide"),
        ({"data": "a", "output": "b", "learning_rate": -1}, "learning_rate=-1 must be a number above 0"),
        ({"data": "a", "output": "b", "eval_share": 1}, "eval_share=1 must be at least 0 and below 1"),
        ({"data": "a", "output": "b", "gpu_memory": "much"}, "gpu_memory='much' is no size: write it as 24GB"),
        ({"data": "a", "output": "b", "columns": {"question": "q"}}, "no role question; the roles are prompt"),
        ({"data": "a", "output": "b", "columns": {"prompt": "q"}}, "columns must name prompt and completion"),
        ({"data": "a", "output": "b", "dtype": "float16"}, "dtype='float16' is unknown"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError) as error:
        TrainSettings.from_dict(values)
    assert message in str(error.value)


def test_sizes_of_memory():
    assert memory_bytes("24GB") == 24_000_000_000 and memory_bytes("1.5 GiB") == 1_610_612_736
    assert memory_bytes(2_000_000) == 2_000_000 and memory_bytes(None) is None


def test_neurons_named_twice_must_agree():
    settings = TrainSettings(data="a", output="b", neurons=64, options={"neurons": 64})
    assert settings.method_options() == {"neurons": 64}
    with pytest.raises(ValueError, match="neurons=64 and the option neurons=32 differ"):
        TrainSettings(data="a", output="b", neurons=64, options={"neurons": 32}).method_options()


def test_where_a_run_lies_does_not_decide_it():
    one = TrainSettings(data="a", output="x")
    assert one.deciding() == TrainSettings(data="a", output="y", checkpoint_steps=3).deciding()
    for other in ({"seed": 1}, {"gpu_memory": "8GB"}):
        assert one.deciding() != TrainSettings(data="a", output="x", **other).deciding()
