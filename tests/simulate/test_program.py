"""What the machine notes beside the work: who does it, what was handed over when, and who waits for what."""

import torch

from meft_bench import observe
from meft_bench.meft.engine.workers import RETRIEVAL, HostQueue
from meft_bench.meft.link import Link
from meft_bench.simulate.device import NAME, simulated_gpu
from meft_bench.simulate.machine import SUBMIT, WAIT_COPY, WAIT_TASK, Machine, Mark, Operation, Program


def _program() -> tuple[Program, int]:
    """A kernel, a task that waits for a copy down and sends one up, and the training thread's wait for it."""
    with simulated_gpu(), Machine() as machine, observe.listening(machine), machine.phase("forward"):
        link, queue = Link(), HostQueue("layer 0", background=True)
        arriving = link.send_to_host(torch.zeros(4, 4, device=NAME) + 1, "hidden")

        def work() -> None:
            staged = link.staging((4, 4), torch.float32, torch.device(NAME))
            staged.copy_(arriving.here() * 2)
            link.send_to_device(staged, torch.device(NAME), "rows")

        number = queue.submit(work, priority=RETRIEVAL).number
        queue.wait()
    return machine.program, number


def test_a_task_is_handed_over_and_waited_for_and_its_work_bears_its_number() -> None:
    program, number = _program()
    marks = [entry for entry in program if isinstance(entry, Mark)]
    assert [(m.kind, m.thread) for m in marks] == [(SUBMIT, 0), (WAIT_COPY, number), (WAIT_TASK, 0)]
    assert marks[0].number == marks[2].number == number and marks[0].queue == 1
    copies = [entry for entry in program if isinstance(entry, Operation) and entry.copy]
    assert [(c.place, c.thread, c.part) for c in copies] == [("d2h", 0, "retrieval"), ("h2d", number, "gather")]
    assert marks[1].number == copies[0].copy
    at_work = [e.name for e in program if isinstance(e, Operation) and e.place == "host" and e.thread == number]
    assert at_work == ["mul.Tensor", "copy_.default"]


def test_the_links_copies_are_page_locked_and_do_not_block() -> None:
    program, _ = _program()
    copies = [entry for entry in program if isinstance(entry, Operation) and entry.place in ("h2d", "d2h")]
    assert len(copies) == 2 and not any(c.blocking for c in copies)
    host = [entry.name for entry in program if isinstance(entry, Operation) and entry.place == "host"]
    assert host.count("copy_.default") == 1  # what staging() gave crosses as it lies, without a copy to locked memory


def test_what_is_not_page_locked_is_copied_on_the_host_first() -> None:
    with simulated_gpu(), Machine() as machine, machine.phase("forward"):
        Link().send_to_device(torch.ones(4), torch.device(NAME), "score")
    assert [(o.place, o.name) for o in machine.operations][1:] == [
        ("host", "copy_.default"),
        ("h2d", "_to_copy.default"),
    ]


def test_memory_that_is_asked_for_costs_no_write() -> None:
    with simulated_gpu(), Machine() as machine, machine.phase("forward"):
        torch.empty_like(torch.empty(1 << 20, device=NAME)).new_empty(1 << 20)
        torch.zeros(4, device=NAME)
    assert sum(o.bytes for o in machine.operations) == 16
