"""Settings every test shares: one thread, no network, and the same examples on each run."""

import os

# Before any Hugging Face import: no test may reach the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import signal

import torch

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may have pytest alone, which is all that the tests of a GPU need
    settings = None

# A suite that a shell starts in the background ignores ctrl-C and hands that down to what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny tensors: more threads would only wait for each other, and sums could be split differently from run to run.
torch.set_num_threads(1)

# A warning that torch gives once per process would fail whichever test happens to come first; so each one counts.
torch.set_warn_always(True)

if settings is not None:
    settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
    settings.load_profile("repeatable")

# The simulated GPU is a device of the whole process: it must be registered before the first backward pass, and once it
# is there, data loaders and trainers take it for a real one. So its tests run in a process of their own.
APART = ("profile", "simulate")


def _asked_apart(config) -> bool:
    return any(part in str(argument).replace("\\", "/").split("/") for argument in config.args for part in APART)


def pytest_ignore_collect(collection_path, config):
    """Leave those folders out of a run that names neither."""
    if collection_path.is_dir() and collection_path.name in APART and collection_path.parent.name == "tests":
        return True if not _asked_apart(config) else None
    return None


def pytest_sessionstart(session):
    """Elsewhere a backward pass comes first, whichever test is run alone: what simulates there starts a process."""
    if not _asked_apart(session.config):
        torch.ones((), requires_grad=True).backward()


def pytest_report_header(config):
    """Say so."""
    apart = " ".join(f"tests/{name}" for name in APART)
    return (
        None if _asked_apart(config) else f"the simulated GPU's tests run apart: pytest {apart} (make test runs both)"
    )
