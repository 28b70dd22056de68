"""Where a run may work and publish, and what must be the same for it to be gone on with, said before work begins."""

import errno
import hashlib
from pathlib import Path

import pytest

from meft_bench import cli
from meft_bench.finetune import early, workplace
from meft_bench.finetune.train import train
from meft_bench.harness.spec import canonical_json
from meft_bench.train import checkpoints, models
from tests.small_disk import NEEDS_ROOT, small_disk

from .conftest import facts, job, write_lines


def quiet(line: str) -> None:
    pass


def test_a_folder_that_must_not_be_written_in_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(workplace.os, "access", lambda place, mode: Path(place).name != "locked")
    for output in (tmp_path / "locked" / "out", tmp_path / "locked" / "deep" / "out"):
        for refuse in (early.refuse_training, lambda settings: train(settings, say=quiet)):
            with pytest.raises(ValueError, match="cannot write in .*locked: let this user write there, or"):
                refuse(job(output))
    assert not any((tmp_path / "locked").iterdir())
    early.refuse_training(job(tmp_path / "out"))


def test_a_result_that_is_there_needs_no_right_to_write(tmp_path, monkeypatch):
    settings = job(tmp_path / "out", steps=1)
    train(settings, say=quiet)
    monkeypatch.setattr(workplace.os, "access", lambda place, mode: False)
    early.refuse_training(settings, resume=True)
    assert train(settings, resume=True, say=quiet) == settings.destination


def test_an_output_below_a_file_or_in_the_place_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder: choose another --output"):
        early.refuse_training(job(tmp_path / "file" / "out"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="is the folder that this is called in.*--output .*empty/adapter"):
        early.refuse_training(job(Path(".")))


@NEEDS_ROOT
def test_a_mounted_folder_cannot_be_replaced(tmp_path):
    """As a container has it: the result would be made beside the disk, and its last step fail."""
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        with pytest.raises(ValueError, match="disk is where a disk is mounted.*such as --output .*disk/adapter"):
            train(job(disk), say=quiet)
        assert (train(job(disk / "adapter", steps=1), say=quiet) / "adapter_config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["disk"]


def test_a_write_that_is_forbidden_is_not_for_lack_of_space(tmp_path, monkeypatch):
    def forbidden(tensors, path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoints, "save_file", forbidden)
    with pytest.raises(ValueError, match="Permission denied.*no checkpoint .*: let this user write there and"):
        train(job(tmp_path / "out", checkpoint_steps=1), say=quiet)


def test_another_chat_template_in_the_same_file_is_not_gone_on_with(tmp_path, monkeypatch):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    talks = [
        {"messages": [{"role": "user", "content": f["prompt"]}, {"role": "assistant", "content": f["completion"]}]}
        for f in facts(8)
    ]
    data = str(write_lines(tmp_path / "r.jsonl", talks))
    settings = job(tmp_path / "out", data=data, chat_template=str(template), checkpoint_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(workplace, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings, say=quiet)
    kept = template.read_text()
    template.write_text(kept.replace("{{ m.content }}", "{{ m.role }} {{ m.content }}"))
    with pytest.raises(ValueError, match="unfinished run of other .*the content of chat_template changed"):
        train(settings, resume=True, say=quiet)
    template.write_text(kept)
    train(settings, resume=True, say=quiet)
    template.write_text("{{ messages[0].content }} {{ messages[1].content }}")
    with pytest.raises(ValueError, match="result of other settings.*the content of chat_template changed"):
        train(settings, resume=True, say=quiet)


def test_runs_without_such_files_keep_their_digest(tmp_path):
    settings = job(Path("out"))
    assert "files" not in workplace._about(settings, "0" * 12)
    before = hashlib.sha256(canonical_json([settings.deciding(), "0" * 12]).encode()).hexdigest()[:12]
    assert workplace.settings_digest(settings, "0" * 12) == before


def test_a_revision_of_what_has_none_is_refused(tmp_path):
    """It would stand in the model card."""
    for model in ("embedded", str(models.embedded_dir())):
        with pytest.raises(ValueError, match="revision=abc is for a model of the hub, which .*embedded is not"):
            early.refuse_training(job(tmp_path / "out", model=model, revision="abc"))


@pytest.mark.parametrize("given", [{"subset": "unfiltered"}, {"split": "validation"}])
def test_a_part_of_a_file_that_has_no_parts_is_refused(tmp_path, given):
    """All of its rows would be trained on."""
    settings = job(tmp_path / "out", **given)
    for refuse in (early.refuse_training, train):
        with pytest.raises(ValueError, match="is for a data set of the hub, which .* is not: leave it out"):
            refuse(settings)


def test_list_names_the_suites_where_there_is_none_of_the_name(capsys):
    assert cli.main(["list", "--suite", "nosuch"]) == 2
    assert "unknown suite 'nosuch'; known: smoke, default" in capsys.readouterr().err
