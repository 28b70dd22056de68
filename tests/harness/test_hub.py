"""A hub that does not answer costs seconds, and one line names what to do."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from meft_bench import hub


@pytest.fixture
def server():
    """An address at which connections are taken; said is what each gets (None: silence)."""
    listening = socket.create_server(("127.0.0.1", 0))
    said: list[bytes | None] = [None]
    taken = []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            taken.append(connection)
            if said[0] is not None:
                connection.recv(65536)
                connection.sendall(said[0])
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", said, taken
    listening.close()
    for connection in taken:
        connection.close()


@pytest.fixture
def online(monkeypatch, server, tmp_path):
    """This process as if it were online, with the server as its hub and an empty cache."""
    from datasets import config
    from huggingface_hub import close_session, constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_S", 2.0)
    hub._answers.cache_clear()
    close_session()
    yield constants
    hub._answers.cache_clear()
    close_session()


def test_a_silent_hub_is_asked_once_and_named(online, server):
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(ValueError, match="the hub does not answer within 2 s, and nobody/nothing is not in the ca"):
            hub.check_model("nobody/nothing")
    assert time.monotonic() - start < 15 and len(server[2]) == 1
    assert online.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1", "nobody else in this process waits again"


def test_what_is_in_the_cache_needs_no_hub(online, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: asked.append((a, k)) or "there")
    hub.check_model("nobody/nothing", "abc")
    assert asked == [(("nobody/nothing", "config.json"), {"revision": "abc"})] and online.HF_HUB_OFFLINE


@pytest.mark.parametrize(("status", "answers"), [("200 OK", True), ("404 Not Found", True), ("401 No", True),
                                                 ("503 Busy", False)])  # fmt: skip
def test_any_answer_but_trouble_is_one(online, server, status, answers):
    server[1][0] = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    assert hub._answers("nobody/nothing", "dataset") is answers
    assert online.HF_HUB_OFFLINE is not answers


def test_a_name_that_is_not_looked_up_in_time(online, monkeypatch):
    monkeypatch.setattr(hub, "_ask", lambda *_: time.sleep(30))
    start = time.monotonic()
    hub.check_data("nobody/nothing")
    assert time.monotonic() - start < 15 and online.HF_HUB_OFFLINE


def test_folders_and_the_embedded_model_ask_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_answers", lambda *_: pytest.fail("asked the hub"))
    for source in (tmp_path, str(tmp_path), "embedded"):
        hub.check_model(source)


def test_lm_evals_own_tasks_ask_once(monkeypatch, tmp_path):
    from meft_bench.finetune import evaluate

    asked = []
    monkeypatch.setattr(hub, "check_data", asked.append)
    (tmp_path / "t.yaml").write_text("task: mine\ndataset_path: json\noutput_type: generate_until\n")
    evaluate._other_tasks(["mine"], tmp_path)
    assert asked == [], "a task of the user's own"
    evaluate._other_tasks(["arc_easy"], None)
    assert asked == ["arc_easy"]


@pytest.mark.slow
def test_train_ends_in_seconds_with_one_line(server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server[0], "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
                   "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    command = [sys.executable, "-m", "meft_bench", "train", "--model", "nobody/nothing", "--data", "example"]
    done = subprocess.run([*command, "--output", "out"], env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 2, done
    assert done.stderr.strip() == (
        "meft-bench: the hub does not answer within 5 s, and nobody/nothing is not in the cache: check the network and "
        "the name, or give a folder with --model"
    )
    assert len(server[2]) == 1 and not list(tmp_path.glob("out*"))
