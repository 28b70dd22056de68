"""Conversations as a chat template writes them.

A template is a program, often a stranger's: transformers' sandbox keeps it from files and from Python's insides, but
not from writing without end. So templates run in a child process with bounded memory and time.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from meft_bench.reading import read_text
from meft_bench.text import cut

if TYPE_CHECKING:  # template files are looked at before transformers is imported
    from transformers import PreTrainedTokenizerBase

_LARGEST_TEMPLATE = 2**20
_MEMORY = 256 * 2**20
"""Bytes that a template may take beside what the process has."""
_SECONDS = 0.5
"""Processor time for one conversation, which takes a thousandth of it."""
_PATIENCE = 30.0
"""Seconds on the clock, for a machine that is busy."""
_LARGEST_TEXT = 2**24
"""Characters of one conversation."""


class TemplateFault(ValueError):
    """A conversation that the template does not write; number counts from 0 in the list that was asked for."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"the chat template fails: {why}")
        self.number = number


def read_template(path: str | None) -> str | None:
    """The text of a template file; None for None. Raises ValueError."""
    return None if path is None else read_text(Path(path), _LARGEST_TEMPLATE, "chat template")


class Renderer:
    """Writes conversations with a tokenizer's chat template or another one. Use as a context manager.

    template: Jinja text; None takes the tokenizer's. Raises ValueError when there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: give a Jinja file with --chat-template, or rows with prompt and "
                "completion"
            )
        self.tokenizer, self.template = tokenizer, template
        self._child: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()  # it holds nothing
            self._child.join()
        self._child = self._pipe = None

    def prompts(self, conversations: Sequence[list[dict[str, Any]]]) -> list[str]:
        """What the model is given to answer: the messages and the opening of the assistant's turn."""
        return self.write([{"conversation": c, "add_generation_prompt": True} for c in conversations])

    def write(self, calls: Sequence[dict[str, Any]]) -> list[str]:
        """Each call's text, as apply_chat_template(**call) gives it. Raises TemplateFault naming the first that fails
        or goes beyond the bounds of memory and time."""
        found = self._results(calls)
        for number, (good, text) in enumerate(found):
            if not good:
                raise TemplateFault(number, text)
        return [text for _, text in found]

    def attempt(self, calls: Sequence[dict[str, Any]]) -> list[str | None]:
        """Each call's text, None for one that fails."""
        return [text if good else None for good, text in self._results(calls)]

    def _results(self, calls: Sequence[dict[str, Any]]) -> list[tuple[bool, str]]:
        if not calls:
            return []
        if not sys.platform.startswith("linux"):
            return [_written(self.tokenizer, self.template, call) for call in calls]
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send(list(calls))
        found: list[tuple[bool, str]] = []
        while len(found) < len(calls) and self._pipe is not None:
            found.append(self._receive())
        return found + found[-1:] * (len(calls) - len(found))

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # A fork has everything loaded, and nothing of the parent's that it touches.
        context = multiprocessing.get_context("fork")
        self._child = context.Process(
            target=_serve, args=(theirs, self._pipe, self.tokenizer, self.template), daemon=True
        )
        with _no_word_of_a_fork():
            self._child.start()
        theirs.close()

    def _receive(self) -> tuple[bool, str]:
        """The next result; the child is ended when it takes too long."""
        assert self._pipe is not None
        child, start = psutil.Process(self._child.pid), time.monotonic()
        used, why = _processor_s(child), "it ends the process that runs it"
        while not self._pipe.poll(0.05):
            if _processor_s(child) - used > _SECONDS or time.monotonic() - start > _PATIENCE:
                why = f"it does not end within {_SECONDS:g} s"
                break
        else:
            try:
                return self._pipe.recv()  # type: ignore[no-any-return]
            except (EOFError, ConnectionResetError):
                pass
        self.__exit__()
        return False, why


def _processor_s(child: psutil.Process) -> float:
    try:
        times = child.cpu_times()
        return float(times.user + times.system)
    except psutil.Error:
        return 0.0


def _serve(pipe: Connection, other: Connection, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """The child's life: it ends when the parent closes its end."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    size = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            os._exit(0)
        for call in calls:
            pipe.send(_written(tokenizer, template, call))


def _written(tokenizer: PreTrainedTokenizerBase, template: str | None, call: dict[str, Any]) -> tuple[bool, str]:
    """(True, text) or (False, why not)."""
    try:
        text = str(tokenizer.apply_chat_template(**call, chat_template=template, tokenize=False))
    except MemoryError:
        return False, f"it needs more than {_MEMORY // 2**20} MB"
    except RecursionError:
        return False, "it is nested too deeply"
    except Exception as error:  # Jinja, transformers and the template itself raise many kinds
        said = cut(str(error).strip().partition("\n")[0], 200)
        line = getattr(error, "lineno", None)
        return False, f"{type(error).__name__}{f' in its line {line}' if line else ''}{f': {said}' if said else ''}"
    if len(text) > _LARGEST_TEXT:
        return False, f"it writes more than {_LARGEST_TEXT:,} characters"
    return True, text


@contextmanager
def _no_word_of_a_fork():  # type: ignore[no-untyped-def]
    """tokenizers warns of a fork unless told how parallel it may be; the child does not use it in parallel."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
