"""The threads that help with a kernel: as many as asked for, asleep without work, in a forked child and at the end too;
and which cores they are bound to."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest
import torch

from meft_bench import cli
from meft_bench.bench.common import threads
from meft_bench.meft.engine import adamw, cores, kernels, native
from meft_bench.meft.engine.schedule import step_constants
from meft_bench.meft.engine.workers import HostQueue

pytestmark = pytest.mark.skipif(not native.fits(torch.zeros(1)), reason=native.status())

WAIT_S = 20
"""Longer than anything here takes; what would wait for ever fails instead."""
Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def run(work: Callable[[], None], helpers: int) -> None:
    """work by this thread and the helpers, as a kernel without rows."""
    native.kernels().pool.run(Kernel(lambda *_: work()), None, 0, 1, helpers)


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    set_up = "import os, time, threading, torch\nfrom meft_bench.meft.engine import kernels\ntorch.set_num_threads(2)\n"
    command = [sys.executable, "-c", set_up + textwrap.dedent(code)]
    given = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=given)


# ---- sharing work ----


def test_as_many_threads_as_asked_for_work_at_once() -> None:
    for helpers in (0, 1, 3, 2):
        together, seen = threading.Barrier(helpers + 1, timeout=WAIT_S), set()

        def work(together=together, seen=seen) -> None:
            seen.add(threading.get_native_id())
            together.wait()

        run(work, helpers)
        assert len(seen) == helpers + 1 and threading.get_native_id() in seen


def test_a_caller_waits_for_no_helper_that_has_not_begun() -> None:
    most, begun, go = 8, threading.Semaphore(0), threading.Event()
    meanwhile: list[int] = []

    def held() -> None:
        if threading.current_thread() is caller:
            assert all(begun.acquire(timeout=WAIT_S) for _ in range(most))
            others.set()
        else:
            begun.release()
            assert go.wait(WAIT_S)

    others = threading.Event()
    caller = threading.Thread(target=run, args=(held, most))
    caller.start()
    assert others.wait(WAIT_S)  # all helpers work, unless an earlier test had more
    run(lambda: meanwhile.append(threading.get_ident()), 1)
    assert threading.get_ident() in meanwhile and caller.is_alive()
    go.set()
    caller.join(WAIT_S)
    assert not caller.is_alive()


def test_results_have_the_same_bits_on_any_number_of_threads() -> None:
    found = []
    for number in (1, 2, 5):
        with threads(number):
            generator = torch.Generator().manual_seed(0)
            rows_RX = torch.randn(600, 256, generator=generator)
            index_U = torch.randperm(600, generator=generator)[:500]
            state = adamw.RowState(
                rows_RX.clone(), torch.zeros(600, 256), torch.zeros(600, 256), torch.zeros(600, dtype=torch.int32),
                torch.zeros(600, dtype=torch.bool), 0,
            )  # fmt: skip
            steps = adamw.Steps(torch.tensor([step_constants(1, 1e-2, (0.9, 0.999), 0.0)]), 0, 0.9, 0.999, 1e-8, 0.1)
            adamw.advance(state, rows_RX, index_U, 1, steps)
            h_TD, experts_TP = rows_RX[:40], torch.arange(80).view(40, 2) % 60
            search = kernels.search_experts(h_TD, rows_RX, None, experts_TP, None, 10, 4, False)
            moved = kernels.gather(rows_RX, index_U, torch.empty(500, 256, dtype=torch.bfloat16))
            found.append([state.rows_RX, state.first_RX, state.still_R, kernels.squares(rows_RX), *search, moved])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_threads_may_call_at_once() -> None:
    source = torch.randn(400, 512)
    index_U = torch.randperm(400)
    wanted, wrong = source[index_U], []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(kernels.gather(source, index_U, torch.empty(400, 512)), wanted):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    with threads(3):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=WAIT_S)
    assert not wrong and not any(caller.is_alive() for caller in callers)


def test_helpers_sleep_when_there_is_no_work() -> None:
    run(lambda: None, 3)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2  # of three threads that are busy it would be what the cores give


def test_helpers_are_waited_for_when_the_caller_is_interrupted() -> None:
    own_part, done = threading.Event(), []

    def work() -> None:
        if threading.current_thread() is threading.main_thread():
            own_part.set()
        elif own_part.wait(WAIT_S):
            time.sleep(0.05)  # it has left its own part
            os.kill(os.getpid(), signal.SIGINT)  # Python's own thread has to answer it
            time.sleep(0.2)
            done.append("done")  # it would work on freed memory had the caller gone on

    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):  # a helper may come too late
            own_part.clear()
            run(work, 1)
            time.sleep(0.01)
    assert done == ["done"]


# ---- processes ----


def test_forked_children_have_helpers_of_their_own_whatever_other_threads_do() -> None:
    code = """
        x, i = torch.randn(500, 512), torch.arange(500)
        # Compared by numpy: torch's own threads do not survive a fork.
        def same(): return (kernels.gather(x, i, torch.empty(500, 512)).numpy() == x.numpy()).all()
        assert same()
        ending = threading.Event()
        def others():
            while not ending.is_set(): assert same()
        callers = [threading.Thread(target=others) for _ in range(2)]
        for caller in callers: caller.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                fine = same() and same() and len(os.listdir("/proc/self/task")) == 2
                os._exit(0 if fine else 3)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        ending.set()
        for caller in callers: caller.join()
        print(same())
    """
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    done = child(code)
    assert done.stdout.split() == ["0"] * 10 + ["True"], done.stderr


def test_the_process_ends_with_queued_work_done_and_without_a_word() -> None:
    code = """
        from meft_bench.meft.engine.workers import RETRIEVAL, HostQueue
        x, i = torch.randn(500, 512), torch.arange(500)
        def work():
            time.sleep(0.3)  # the main thread is at its end, and so are the helpers
            print((kernels.gather(x, i, torch.empty(500, 512)) == x).all().item(), flush=True)
        kernels.gather(x, i, torch.empty(500, 512))
        HostQueue("layer", background=True).submit(work, priority=RETRIEVAL)
    """
    done = child(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# ---- cores ----


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """A process that may use cores 0 to 7, with MEFT_BENCH_CORES as given, one of some ranks."""

    def made(asked: str, rank: int = 0, beside: int = 1) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
        monkeypatch.setenv(cores.ASKED, asked)
        ranks = {"RANK": rank, "WORLD_SIZE": beside, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": beside}
        for name, number in ranks.items():
            monkeypatch.setenv(name, str(number))

    return made


@pytest.mark.parametrize(
    "asked, rank, beside, bound, said",
    [
        ("", 0, 1, (), ""),
        ("auto", 0, 1, (1, 2, 3, 4, 5, 6, 7), "cores 1-7 "),
        ("6,2-4", 0, 1, (6, 2, 3, 4), "cores 2-4,6 "),
        ("2-7", 1, 3, (4, 5), "cores 4-5 "),
        ("auto", 1, 2, (5, 6, 7), "cores 5-7 "),
        ("auto", 7, 8, (7,), "cores 7 "),
    ],
)
def test_cores_are_those_asked_for(machine, asked: str, rank: int, beside: int, bound: tuple, said: str) -> None:
    machine(asked, rank, beside)
    assert cores.given() == bound
    assert said in cores.text() and said in native.status() and (cores.text() in native.status())


@pytest.mark.parametrize(
    "asked, beside, message",
    [
        ("6-9", 1, "MEFT_BENCH_CORES='6-9': this process may not use core 8 (it has 0-7)"),
        ("all", 1, "'all' names no cores; write auto, or a list like 2-7,10"),
        ("3-2", 1, "'3-2' names no cores"),
        ("1,,2", 1, "'' names no cores"),
        ("-1", 1, "'-1' names no cores"),
        ("1-3,2", 1, "names a core twice"),
        ("1-3", 4, "3 cores for 4 ranks; name one for each at least"),
    ],
)
def test_what_is_no_list_of_cores_is_refused_in_one_line(machine, asked: str, beside: int, message: str) -> None:
    machine(asked, beside=beside)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        HostQueue("layer 0")
    assert "\n" not in str(told.value)


def test_train_refuses_it_before_any_work(machine, tmp_path, capsys) -> None:
    machine("8")
    assert cli.main(["train", "--data", "example", "--output", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err == (
        "meft-bench: MEFT_BENCH_CORES='8': this process may not use core 8 (it has 0-7)\n"
    )
    assert not (tmp_path / "made").exists()


def test_a_system_that_cannot_bind_says_so_and_goes_on(machine, monkeypatch) -> None:
    machine("nonsense")
    monkeypatch.delattr(os, "sched_setaffinity")
    assert cores.given() == () and cores.text() == "threads not bound: this system cannot (MEFT_BENCH_CORES)"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_helpers_and_workers_are_bound_and_the_training_loop_is_free() -> None:
    code = """
        from meft_bench.meft.engine.workers import RETRIEVAL, HostQueue
        x, i = torch.randn(500, 512), torch.arange(500)
        queue = HostQueue("layer", background=True)
        before = {int(t) for t in os.listdir("/proc/self/task")}
        queue.submit(lambda: kernels.gather(x, i, torch.empty(500, 512)), priority=RETRIEVAL)
        queue.wait()
        time.sleep(0.1)
        main, new = os.getpid(), [int(t) for t in os.listdir("/proc/self/task") if int(t) not in before]
        print(sorted(os.sched_getaffinity(main)), *[sorted(os.sched_getaffinity(t)) for t in new], sep=";")
    """
    usable = sorted(os.sched_getaffinity(0))
    last = usable[-1]
    done = child(code, MEFT_BENCH_CORES=str(last))
    free, *bound = done.stdout.strip().split(";")
    assert free == str(usable) and bound == [str([last])] * 3, done  # two workers and a helper
