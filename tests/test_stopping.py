"""Ctrl-C is answered with one line and 130 wherever it lands; a kill at any moment resumes to the same bits."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from meft_bench import stopping
from meft_bench.meft.engine.workers import RETRIEVAL, HostQueue

from .kill_sweep import TARGETS, sweep


def test_ctrl_c_in_code_that_is_made_from_a_string_ends_with_130(tmp_path: Path) -> None:
    """As in a dataclass while a library is imported."""
    (tmp_path / "command.py").write_text(
        textwrap.dedent("""
        import sys
        from meft_bench import __main__, cli

        def stopped() -> int:
            try:
                exec("raise KeyboardInterrupt")
            except KeyboardInterrupt:
                return 130

        cli.main = stopped
        sys.exit(__main__.main())
    """)
    )
    command = [sys.executable, "-m", "command"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == 130


def _child(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# What libraries make of an interrupt: their own error, nothing at all, or what they should.
MADE = {
    "itself": "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "another error": """
    try:
        os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
    except KeyboardInterrupt as error:
        raise RuntimeError('host work failed') from error""",
    "nothing": """
    try:
        os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
    except KeyboardInterrupt:
        pass
    stopping.stop_if_asked()""",
}


@pytest.mark.parametrize("made", MADE)
def test_whatever_is_made_of_ctrl_c_it_is_answered_alike(made):
    done = _child(f"""
import os, signal, sys, time
from meft_bench import cli, stopping
from meft_bench.harness import cli as harness_cli
def command(args):
    {MADE[made]}
harness_cli._list = command
sys.exit(cli.main(["list"]))
""")
    assert done.returncode == 130 and "Traceback" not in done.stderr, done
    assert done.stderr.strip().startswith("meft-bench: stopped; finished runs are kept")


def test_a_second_ctrl_c_ends_the_process_without_a_word():
    done = _child("""
        import os, signal
        from meft_bench.stopping import ctrl_c_stops
        try:
            with ctrl_c_stops():
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
    """)
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_ctrl_c_while_the_command_line_is_read_in():
    done = _child("""
        import sys, signal
        class Interrupted:
            def find_spec(self, name, *rest):
                if name == "meft_bench.cli":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupted())
        from meft_bench.__main__ import main
        sys.exit(main())
    """)
    assert done.returncode == 130 and done.stderr.strip() == "meft-bench: stopped"


def test_a_process_told_to_ignore_ctrl_c_goes_on():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.ctrl_c_stops():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_and_handlers_stay_what_they_are():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="as it was"), stopping.ctrl_c_stops():
        assert signal.getsignal(signal.SIGINT) is not before
        raise RuntimeError("as it was")
    assert signal.getsignal(signal.SIGINT) is before
    raised = []

    def elsewhere():
        with stopping.ctrl_c_stops():  # only the main thread may set handlers
            raised.append("fine")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert raised == ["fine"]
    stopping.stop_if_asked()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_immediate_host_work_is_no_failure_of_the_layer(error):
    def interrupted():
        raise error

    with pytest.raises(error):
        HostQueue("layer 0").submit(interrupted, priority=RETRIEVAL)


@pytest.mark.slow
def test_kills_resume_to_the_same_bits(tmp_path: Path):
    # Six of the sixty: python tests/kill_sweep.py does them all.
    targets = [TARGETS["train"][0], TARGETS["run"][1]]
    assert sweep(targets, 6, tmp_path, seed=1, jobs=min(2, os.cpu_count() or 1)) == []


def test_a_worker_ends_when_its_owner_is_killed():
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = "import sys, time; from meft_bench.stopping import end_with; end_with(int(sys.argv[1])); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code, str(owner.pid)])
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(2)
    owner.kill()
    owner.wait()
    assert worker.wait(30) == 1
